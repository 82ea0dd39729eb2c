"""Pictures, pages, traces and snapshots of plans: what is in the files, and who can read them."""

from __future__ import annotations

import json
import pickle
import pickletools
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from eager import sgd
from graphs import diamond, graphs
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn
from torch.cuda import _memory_viz

import olla
from olla import Graph, OllaError, Op, Plan, Storage
from olla.graph.lifetimes import Spill, memory_profile, peak_bytes
from olla.order.schedule import program_order, schedule
from olla.place.place import place
from olla.show import draw
from olla.show.blocks import eager_memory, total

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
NODE = shutil.which("node")


def planned(graph: Graph) -> Plan:
    plan = Plan.of(graph, schedule(graph))
    return plan.at(place(graph, plan.order, alignment=1))


class FileTestCase(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)


class FormatsTest(FileTestCase):
    def test_every_ending_is_written_in_its_own_form(self) -> None:
        graph = diamond()
        for name, what, beginning in (
            ("a.png", None, b"\x89PNG"),
            ("b.png", "addresses", b"\x89PNG"),
            ("a.pdf", "memory", b"%PDF"),
            ("a.svg", None, b"<?xml"),
            ("a.dot", None, b"digraph"),
            ("a.html", None, b"<!doctype html>"),
            ("a.json", None, b'{"traceEvents"'),
            ("a.pickle", None, pickle.dumps({})[:2]),
        ):
            draw(graph, planned(graph), self.folder / name, what)
            self.assertTrue((self.folder / name).read_bytes().startswith(beginning), name)

    def test_a_step_without_bytes_and_one_without_ops_are_drawn(self) -> None:
        for graph in (Graph((Op("nothing"),), ()), Graph((), ())):
            for name, what in (("a.png", "memory"), ("b.png", "addresses"), ("a.html", None), ("a.json", None)):
                draw(graph, planned(graph), self.folder / name, what)

    def test_pictures_say_what_they_show(self) -> None:
        graph = Graph(
            (Op("f", creates=(0,), workspace=5), Op("g", creates=(1,), reads=(0,), backward=True)),
            (Storage("x", 20), Storage("dx", 3)),
            outputs=(1,),
        )
        draw(graph, planned(graph), self.folder / "memory.svg")
        text = (self.folder / "memory.svg").read_text()
        for label in ("activation", "gradient", "workspace", "lower bound", "eager, bytes", "peak 25.00 at step 0"):
            self.assertIn(f"<!-- {label} -->", text)
        draw(graph, planned(graph), self.folder / "addresses.svg", "addresses")
        text = (self.folder / "addresses.svg").read_text()
        self.assertIn("<!-- 3 blocks in 25 bytes, 0.00% of it fragmentation -->", text)
        self.assertIn("<!-- arena; above it, what outlives the step -->", text)

    def test_what_cannot_be_drawn_is_an_error_and_leaves_no_file(self) -> None:
        graph = diamond()
        plan = planned(graph)
        other = replace(plan, peak_bytes=plan.peak_bytes + 1)
        for name, given_plan, what, message in (
            ("a.bmp", plan, None, "nothing is written so; known endings: .dot, .html"),
            ("a.bmp", plan, "memory", "memory is written as .png or .svg or .pdf"),
            ("a.html", plan, "addresses", "addresses is written as .png"),
            ("a.html", None, None, "nothing without a plan is written so"),
            ("a.html", None, "page", "page is drawn of a plan, and none is given"),
            ("a.png", other, None, "16 bytes claimed, 15 needed"),
            ("a.png", plan.at(None), "addresses", "no addresses to show: olla plan --place"),
            ("a.pickle", plan.at(None), None, "no addresses to show: olla plan --place"),
        ):
            with self.assertRaisesRegex(OllaError, message):
                draw(graph, given_plan, self.folder / name, what)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_it_needs_neither_torch_nor_matplotlib_for_a_page(self) -> None:
        graph = diamond()
        graph.save(self.folder / "graph.json")
        planned(graph).save(self.folder / "plan.json")
        code = """
import sys
from olla import Graph, Plan
from olla.show import draw
draw(Graph.load("graph.json"), Plan.load("plan.json"), "plan.html")
assert not {"torch", "matplotlib", "pydot"} & set(sys.modules)
"""
        package = str(Path(olla.__file__).parents[1])
        command = [sys.executable, "-W", "ignore", "-c", code]
        subprocess.run(command, check=True, cwd=self.folder, env={"PYTHONPATH": package})
        self.assertTrue((self.folder / "plan.html").exists())


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(300, 300) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class StepTest(FileTestCase):
    def test_a_step_is_drawn_with_its_own_times_and_addresses(self) -> None:
        model, x = Model(), torch.randn(16, 300)
        with olla.optimize(model, x, optimizer=sgd(model.parameters())) as step:
            with self.assertRaisesRegex(OllaError, "a step after its first runs"):
                step.draw(self.folder / "step.pickle")
            for _ in range(3):
                step(x)
            step.draw(self.folder / "step.pickle")
            step.draw(self.folder / "step.json")
            plan, seconds = step.plan, step._current.draft.seconds
        trace = json.loads((self.folder / "step.json").read_text())
        took = [event["dur"] for event in trace["traceEvents"] if event["ph"] == "X" and event["pid"] == 1]
        self.assertEqual(len(took), len(plan.order))
        self.assertAlmostEqual(sum(took), sum(seconds) * 1e6, delta=1)
        snapshot = pickle.loads((self.folder / "step.pickle").read_bytes())
        self.assertEqual(peak_of(snapshot), plan.peak_bytes)
        allocated = [event for event in snapshot["device_traces"][0] if event["action"] == "alloc"]
        lines = Path(__file__).read_text().splitlines()
        [tanh] = {lines[e["frames"][0]["line"] - 1].strip() for e in allocated if "addmm" in e["frames"][0]["name"]}
        self.assertEqual(tanh, "x = torch.tanh(layer(x))")


def peak_of(snapshot: dict[str, Any]) -> int:
    alive = peak = 0
    for event in snapshot["device_traces"][0]:
        alive += {"alloc": event["size"], "free_completed": -event["size"]}.get(event["action"], 0)
        peak = max(peak, alive)
    return peak


class SnapshotTest(FileTestCase):
    def snapshot(self, graph: Graph, plan: Plan) -> Any:
        path = self.folder / "plan.pickle"
        draw(graph, plan, path)
        return pickle.loads(path.read_bytes())

    @given(graphs())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_it_has_the_peak_of_the_plan_and_no_two_blocks_at_once_at_one_address(self, graph: Graph) -> None:
        plan = planned(graph)
        snapshot = self.snapshot(graph, plan)
        self.assertEqual(peak_of(snapshot), max((0, *memory_profile(graph, plan.order))))
        alive: dict[int, int] = {}
        for event in snapshot["device_traces"][0]:
            if event["action"] == "alloc":
                for start, size in alive.items():
                    self.assertTrue(event["addr"] >= start + size or start >= event["addr"] + event["size"])
                alive[event["addr"]] = event["size"]
            elif event["action"] == "free_completed":
                self.assertEqual(alive.pop(event["addr"]), event["size"])
        outputs = sum(graph.storages[s].size for s in set(graph.outputs) if not graph.storages[s].persistent)
        self.assertEqual(sum(alive.values()), outputs)

    def test_pytorch_reads_it(self) -> None:
        snapshot = self.snapshot(diamond(), planned(diamond()))
        summary = _memory_viz.segsum(snapshot)  # raises if the sums do not agree
        self.assertIn("segments: 2", summary)
        self.assertIn("total_allocated: 2.0B", summary)  # the output
        history = _memory_viz.trace(snapshot)
        self.assertEqual(history.count("cudaMalloc"), 2)
        self.assertEqual(len(re.findall(r"^\w+ = \w+\[", history, re.M)), 5)
        self.assertIn("snapshot.pickle", _memory_viz.trace_plot(snapshot))
        flames = _memory_viz.memory(snapshot, format_flamegraph=str)
        self.assertIn("stream_0;active_allocated;unknown:0:join 2", flames)

    def test_the_unpickler_of_the_visualizer_knows_all_of_it(self) -> None:
        # https://github.com/pytorch/pytorch/blob/main/torch/utils/viz/MemoryViz.js, unpickle()
        known = [
            "PROTO",
            "FRAME",
            "MARK",
            "STOP",
            "MEMOIZE",
            "BINGET",
            "LONG_BINGET",
            "BINPUT",
            "LONG_BINPUT",
            "NONE",
            "NEWTRUE",
            "NEWFALSE",
            "BININT",
            "BININT1",
            "BININT2",
            "LONG1",
            "BINFLOAT",
            "SHORT_BINUNICODE",
            "BINUNICODE",
            "EMPTY_LIST",
            "LIST",
            "APPEND",
            "APPENDS",
            "EMPTY_TUPLE",
            "TUPLE",
            "TUPLE1",
            "TUPLE2",
            "TUPLE3",
            "EMPTY_DICT",
            "DICT",
            "SETITEM",
            "SETITEMS",
        ]
        self.snapshot(diamond(), planned(diamond()))
        opcodes = list(pickletools.genops((self.folder / "plan.pickle").read_bytes()))
        self.assertLessEqual({opcode.name for opcode, _, _ in opcodes}, set(known))
        self.assertEqual(opcodes[0][1], 4)

    def test_an_arena_without_bytes_is_no_segment(self) -> None:
        graph = Graph((Op("f", creates=(0,)),), (Storage("x", 8),), outputs=(0,))
        [segment] = self.snapshot(graph, planned(graph))["segments"]
        self.assertEqual((segment["total_size"], segment["blocks"][0]["state"]), (8, "active_allocated"))

    def test_a_workspace_where_a_result_comes_later_is_given_back_first(self) -> None:
        graph = Graph((Op("f", creates=(0,), workspace=4),), (Storage("x", 10),))
        plan = Plan.of(graph, program_order(graph))
        plan = replace(
            plan, offsets=(0,), workspaces=((0, 6, 4), (0, 10, 4)), arena_bytes=14, arena_lower_bound_bytes=14
        )
        actions = [(e["action"], e["size"]) for e in self.snapshot(graph, plan)["device_traces"][0][1:]]
        self.assertEqual([size for action, size in actions if action == "alloc"], [4, 10, 4])
        self.assertEqual(actions[2], ("free_completed", 4))


class TraceTest(FileTestCase):
    def test_slices_follow_the_plan_and_counters_are_its_memory(self) -> None:
        graph = Graph(
            (
                Op("a", creates=(0,)),
                Op("b", creates=(1,), reads=(0,)),
                Op("c", reads=(1,), source="net.py:3"),
                Op("d", reads=(0,)),
            ),
            (Storage("x", 6), Storage("y", 2)),
        )
        spills = (Spill(0, 2, 3),)
        order = (0, 1, 2, 3)
        found = replace(program_order(graph), spills=spills, peak_bytes=peak_bytes(graph, order, spills))
        path = self.folder / "plan.json"
        draw(graph, Plan.of(graph, found), path, seconds=[1.0, 2.0, 4.0, 8.0])
        events: dict[str, list[Any]] = defaultdict(list)
        for event in json.loads(path.read_text())["traceEvents"]:
            events[event["ph"]].append(event)
        self.assertEqual([e["args"]["name"] for e in events["M"]], ["planned", "eager PyTorch"])
        slices = [e for e in events["X"] if e["pid"] == 1]
        self.assertEqual([(e["name"], e["ts"], e["dur"]) for e in slices][2], ("c", 3_000_000, 4_000_000))
        self.assertEqual(slices[2]["args"], {"step": 2, "op": 2, "source": "net.py:3", "again": False})
        self.assertEqual([sum(e["args"].values()) for e in events["C"] if e["pid"] == 1], [6, 8, 2, 6, 6])
        eager = list(total(eager_memory(graph)))
        self.assertEqual([sum(e["args"].values()) for e in events["C"] if e["pid"] == 2], [*eager, eager[-1]])
        self.assertEqual(events["C"][4]["ts"], 15_000_000)
        [begin], [end] = events["b"], events["e"]
        self.assertEqual((begin["name"], begin["ts"], end["ts"]), ("x is away", 3_000_000, 7_000_000))
        self.assertEqual(begin["id2"], end["id2"])

    def test_an_op_that_takes_no_time_has_a_slice_of_its_own(self) -> None:
        path = self.folder / "plan.json"
        graph = diamond()
        draw(graph, planned(graph), path, seconds=[0.0] * len(graph.ops))
        events = json.loads(path.read_text())["traceEvents"]
        slices = [(e["ts"], e["dur"]) for e in events if e["ph"] == "X" and e["pid"] == 1]
        self.assertEqual(slices, [(at, 1) for at in range(len(graph.ops))])


class PageTest(FileTestCase):
    def page(self, graph: Graph, plan: Plan) -> str:
        draw(graph, plan, self.folder / "plan.html")
        return (self.folder / "plan.html").read_text()

    def program(self) -> Graph:
        ops = (
            Op("load", creates=(0,), workspace=500, source="/home/me/models/net.py:7"),
            Op("</script><b>fold", creates=(1,), reads=(0,), source="/home/me/models/net.py:8", backward=True),
        )
        return Graph(ops, (Storage("picture", 3000), Storage("small", 40)), outputs=(1,))

    def test_all_that_it_shows_is_in_it(self) -> None:
        graph = self.program()
        text = self.page(graph, planned(graph))
        self.assertNotIn("http", text)
        self.assertNotRegex(text, r"\bsrc=|\bimport\b|@import|url\(")
        found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
        assert found
        data = json.loads(found[1])
        self.assertEqual(data["ops"][1], {"name": "</script><b>fold", "origin": "backward of models/net.py:8"})
        self.assertEqual(data["eager"], [[3000, 3000], [0, 40], [500, 0]])
        self.assertEqual(data["planned"], data["eager"])
        blocks = {block["name"]: block for block in data["blocks"]}
        self.assertEqual(blocks["picture"]["size"], 3000)
        self.assertEqual((blocks["small"]["outside"], blocks["small"]["offset"]), (True, data["arena"]))
        self.assertEqual(data["facts"][1], ["planned peak", "3.42 KiB (0.0% less)"])

    @unittest.skipUnless(NODE, "node is not installed")
    def test_its_script_is_sound(self) -> None:
        graph = self.program()
        script = self.page(graph, planned(graph)).rsplit("<script>", 1)[1].split("</script>")[0]
        (self.folder / "page.js").write_text(script)
        subprocess.run([NODE, "--check", self.folder / "page.js"], check=True)

    @unittest.skipUnless(BROWSER, "Chromium is not installed")
    def test_a_browser_shows_it_and_what_is_pointed_at(self) -> None:
        graph = self.program()
        for plan, shows_blocks in ((planned(graph), True), (planned(graph).at(None), False)):
            text = self.page(graph, plan)
            script = """<script>
              const box = canvas.getBoundingClientRect(), panel = panels[panels.length - 1];
              const height = panel.memory ? 100 : 1500;
              const clientX = box.left + x(panel, 0.5), clientY = box.top + y(panel, height);
              canvas.dispatchEvent(new PointerEvent("pointermove", { clientX, clientY }));
              canvas.dispatchEvent(new WheelEvent("wheel", { clientX, clientY, deltaY: -120 }));
              draw();
              const seen = pen.getImageData(Math.round((clientX - box.left)), Math.round(clientY - box.top), 1, 1).data;
              document.body.append(`pixel ${seen}`);
            </script>"""
            path = self.folder / "pointed.html"
            path.write_text(text + script)
            command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
            shown = subprocess.run([*command, path.as_uri()], check=True, capture_output=True, text=True, timeout=120)
            self.assertNotIn("CONSOLE", shown.stderr)
            self.assertIn("<dt>planned peak</dt><dd>3.42 KiB (0.0% less)</dd>", shown.stdout)
            tip = shown.stdout.split('id="tip"')[1]
            lines = ["<b>picture</b>", "2.93 KiB, activation", "made by load"] if shows_blocks else ["<b>load</b>"]
            for line in (*lines, "models/net.py:7"):
                self.assertIn(line, tip)
            self.assertIn("pixel 76,120,168,255", tip)  # an activation
