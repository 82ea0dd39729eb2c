"""PyTorch's own allocations, recorded and replayed at given addresses."""

from __future__ import annotations

import gc
import os
import threading
import unittest

import torch

from olla import ExecutionError
from olla.run.arena import Arena, Clock, Counts, Recorder, Replay
from olla.torch_private import cpu_allocations


class ArenaTest(unittest.TestCase):
    """Two ops: the first one makes 256 bytes, the second one 128 bytes, with 64 bytes to work in."""

    def setUp(self) -> None:
        self.clock = Clock()
        self.arena = Arena(torch.device("cpu"))

    def replay(self, offsets: tuple[int, int, int] = (0, 256, 384), arena_bytes: int = 448) -> Replay:
        return Replay(
            self.arena, self.clock, positions=[0, 1, 1], sizes=[256, 128, 64], offsets=offsets, arena_bytes=arena_bytes
        )

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.clock.tell(0)
        first = torch.arange(64, dtype=torch.float32)
        self.clock.tell(1)
        second = torch.empty(128, dtype=torch.uint8)
        torch.empty(64, dtype=torch.uint8)
        return first, second

    def test_a_recording_has_every_allocation_in_its_op(self) -> None:
        recorder = Recorder(self.arena.library, self.clock)
        with recorder:
            first, second = self.step()
            addresses = [first.data_ptr(), second.data_ptr()]
            del first, second
        made = [(index, position, size) for index, position, size, _ in recorder.events if size >= 0]
        self.assertEqual(made, [(0, 0, 256), (1, 1, 128), (2, 1, 64)])
        self.assertEqual([address for _, _, size, address in recorder.events if size >= 128], addresses)
        self.assertEqual(sorted(index for index, _, size, _ in recorder.events if size < 0), [0, 1, 2])

    def test_a_recording_in_parts_notes_what_is_released_between_them_and_nothing_else(self) -> None:
        recorder = Recorder(self.arena.library, self.clock, parts=2)
        with recorder:
            first, second = self.step()
        del first
        torch.empty(64, dtype=torch.uint8)

        def rest() -> None:
            nonlocal second
            with recorder:
                self.clock.tell(2)
                second = torch.empty(192, dtype=torch.uint8)

        thread = threading.Thread(target=rest)
        thread.start()
        thread.join()
        del second
        events = [(index, position, size) for index, position, size, _ in recorder.events]
        made = [(0, 0, 256), (1, 1, 128), (2, 1, 64), (2, 1, -1)]
        self.assertEqual(events, [*made, (0, -1, -1), (3, 2, 192), (1, 2, -1)])

    def test_a_recording_that_is_abandoned_between_its_parts(self) -> None:
        for how in ("abandoned", "forgotten"):
            with self.subTest(how):
                recorder = Recorder(self.arena.library, self.clock, parts=2)
                with recorder:
                    kept = self.step()
                if how == "abandoned":
                    recorder.abandon()
                del recorder
                self.assertEqual(kept[0].tolist(), list(range(64)))
                del kept
                replay = self.replay()
                with replay:
                    self.step()
                self.assertEqual(replay.counts.missed, 0)

    def test_an_exception_in_a_part_ends_the_recording(self) -> None:
        recorder = Recorder(self.arena.library, self.clock, parts=2)
        with self.assertRaises(ValueError), recorder:
            self.step()
            raise ValueError
        self.assertEqual(sum(size >= 0 for _, _, size, _ in recorder.events), 3)
        recorder.abandon()  # nothing is left of it

    def test_tensors_are_at_their_offsets(self) -> None:
        replay = self.replay()
        with replay:
            first, second = self.step()
            self.assertEqual((first.data_ptr(), second.data_ptr()), (self.arena.base, self.arena.base + 256))
            self.assertEqual(first.tolist(), list(range(64)))
            del first, second
        self.assertEqual(replay.counts, Counts(hits=3))

    def test_a_signal_when_a_session_has_just_begun_ends_it(self) -> None:
        class Interrupted(Recorder):
            def _begin(self) -> int:
                super()._begin()
                raise KeyboardInterrupt  # as Python raises it between two instructions

        recorder, interrupted = (kind(self.arena.library, self.clock) for kind in (Recorder, Interrupted))
        with recorder:
            with self.assertRaises(KeyboardInterrupt), interrupted:
                pass
            torch.empty(64, dtype=torch.uint8)  # would be recorded by the other one, if that went on
        self.assertEqual([size for _, _, size, _ in recorder.events], [64, -1])
        self.assertEqual(interrupted.events, [])

    def test_an_arena_that_cannot_be_reserved_ends_no_other_session(self) -> None:
        recorder = Recorder(self.arena.library, self.clock)
        with recorder:
            with self.assertRaises(ExecutionError), self.replay(arena_bytes=2**60):
                pass
            torch.empty(64, dtype=torch.uint8)
        self.assertEqual([size for _, _, size, _ in recorder.events], [64, -1])

    def test_outside_of_a_session_nothing_is_in_the_arena(self) -> None:
        replay = self.replay()
        with replay:
            pass
        first, second = self.step()
        for tensor in (first, second):
            self.assertFalse(self.arena.base <= tensor.data_ptr() < self.arena.base + self.arena.arena_bytes)
        self.assertEqual(replay.counts, Counts())

    def test_what_is_planned_to_be_outside_is_outside(self) -> None:
        replay = self.replay((0, -1, 256), 320)
        with replay:
            _, second = self.step()
        self.assertFalse(self.arena.base <= second.data_ptr() < self.arena.base + 320)
        self.assertEqual(replay.counts.outside, 1)

    def test_a_tensor_that_is_kept_is_never_overwritten(self) -> None:
        replay = self.replay((0, 0, 128), 256)
        with replay:
            first, second = self.step()
            second.fill_(255)
        self.assertEqual(first.tolist(), list(range(64)))
        self.assertEqual((replay.counts.conflicts, replay.counts.escapes), (2, 1))

    def test_other_sizes_are_missed_and_work(self) -> None:
        replay = self.replay()
        with replay:
            self.clock.tell(0)
            other = torch.ones(100, dtype=torch.uint8)
            first, second = self.step()
            self.assertEqual(first.data_ptr(), self.arena.base)
            del first, second
        self.assertEqual(int(other.sum()), 100)
        self.assertEqual((replay.counts.sizes, replay.counts.hits), (1, 3))

    def test_the_profiler_sees_the_blocks_of_an_arena(self) -> None:
        replay = self.replay()

        def run() -> None:
            with replay:
                self.step()

        self.assertEqual(cpu_allocations(run)[:4], [256, 128, 64, -64])
        self.assertEqual(sum(cpu_allocations(run)), 0)

    def test_tensors_outlive_a_closed_arena_and_a_collected_one(self) -> None:
        replay = self.replay()
        with replay:
            first, _ = self.step()
        self.arena.close()
        self.assertEqual(self.arena.arena_bytes, 0)
        self.assertEqual(first.tolist(), list(range(64)))
        with replay:  # reserves it again
            second, _ = self.step()
        del replay, self.arena
        gc.collect()
        self.assertEqual((first + second).tolist(), list(range(0, 128, 2)))

    def test_steps_that_take_turns_share_an_arena_that_grows_to_the_largest(self) -> None:
        small, large = self.replay(), self.replay((1024, 0, 512), 1280)
        for replay, arena_bytes in ((small, 448), (large, 1280), (small, 1280), (large, 1280)):
            with replay:
                self.step()
            self.assertEqual((replay.counts.hits, self.arena.arena_bytes), (3, arena_bytes))

    def test_views_resizes_and_numpy_work_on_blocks_of_an_arena(self) -> None:
        replay = self.replay()
        with replay:
            first, _ = self.step()
        view = first[10:]
        del first
        view.resize_(1000).fill_(1)
        self.assertEqual(float(view.sum()), 1000)
        with replay:
            array = self.step()[0].numpy()
        self.assertEqual(array.tolist(), list(range(64)))

    def test_another_thread_allocates_as_always_and_may_release_blocks(self) -> None:
        replay = self.replay()
        kept = []
        with replay:
            kept.append(self.step()[0])
            thread = threading.Thread(target=lambda: (torch.ones(256, dtype=torch.uint8), kept.clear()))
            thread.start()
            thread.join()
        self.assertEqual((replay.counts.escapes, replay.counts.foreign > 0), (0, True))

    def test_no_memory_for_an_arena(self) -> None:
        with self.assertRaisesRegex(ExecutionError, "no memory for an arena of"), self.replay(arena_bytes=2**60):
            pass

    def test_a_child_process_may_go_on_with_the_step(self) -> None:
        replay = self.replay()
        with replay:
            first, second = self.step()
            child = os.fork()
            if child == 0:  # its memory is a copy
                second.fill_(3)
                del second
                first.add_(1)
                os._exit(0 if first.tolist() == list(range(1, 65)) else 1)
            self.assertEqual(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), 0)
            self.assertEqual(first.tolist(), list(range(64)))
