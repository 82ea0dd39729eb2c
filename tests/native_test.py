"""The C++ half of the arena: compiled once, safely, or not at all with a clear reason; and clean under sanitizers."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

from olla import compiling
from olla.compiling import NativeUnavailableError
from olla.run import native

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
HAS_CUDA_BUILD = bool(torch.version.cuda) and any((path / "cuda.h").exists() for path in native.cuda_headers())


class SanitizerTest(unittest.TestCase):
    def clean_under(self, sanitizer: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            program = f"{folder}/arena_test"
            flags = ["-std=c++20", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread", f"-fsanitize={sanitizer}"]
            subprocess.run(["g++", *flags, str(HERE / "arena_test.cpp"), "-o", program], check=True)
            done = subprocess.run([program, sanitizer], capture_output=True, text=True, check=False)
            self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "all good\n", ""))

    def test_addresses_and_undefined_behaviour(self) -> None:
        self.clean_under("address,undefined")

    def test_threads(self) -> None:
        self.clean_under("thread")


@unittest.skipUnless(HAS_CUDA_BUILD, "this build of PyTorch has no CUDA, or its headers are not there")
class CudaTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)

    def test_it_compiles_without_a_warning(self) -> None:
        command = native.arena("cuda").command("g++", self.folder / "arena_cuda.so")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_in_front_of_the_real_caching_allocator_on_host_memory(self) -> None:
        headers = [f"-isystem{path}" for path in (TORCH / "include", *native.cuda_headers())]
        major = torch.version.cuda.split(".")[0]
        runtime, program = self.folder / f"libcudart.so.{major}", self.folder / "arena_cuda_test"
        versions = self.folder / "versions"
        versions.write_text(f"{runtime.name} {{ global: *; }};")
        link = [f"-Wl,-soname,{runtime.name}", f"-Wl,--version-script={versions}"]
        subprocess.run(
            ["gcc", "-shared", "-fPIC", *headers, str(HERE / "cudart_on_host.c"), "-o", str(runtime), *link], check=True
        )
        libraries = [f"-L{TORCH / 'lib'}", "-lc10", "-lc10_cuda", str(runtime), "-Wl,--allow-shlib-undefined"]
        source = str(HERE / "arena_cuda_test.cpp")
        subprocess.run(["g++", "-std=c++20", "-O1", *headers, source, "-o", str(program), *libraries], check=True)
        search = {**os.environ, "LD_LIBRARY_PATH": f"{self.folder}:{TORCH / 'lib'}"}
        done = subprocess.run([str(program)], env=search, capture_output=True, text=True, check=False)
        self.assertEqual((done.returncode, done.stdout), (0, "all good\n"), done.stderr)


class CompilationTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        patch = mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(self.folder)})
        patch.start()
        self.addCleanup(patch.stop)

    def test_it_is_compiled_once(self) -> None:
        path = native.arena("cpu").compiled()
        self.assertEqual([path], list((self.folder / "olla").iterdir()))
        with mock.patch("subprocess.run", side_effect=AssertionError("compiled again")):
            self.assertEqual(native.arena("cpu").compiled(), path)

    def test_another_torch_is_another_file(self) -> None:
        path = native.arena("cpu").compiled()
        with mock.patch("torch.__version__", "9.9.9"):
            self.assertNotEqual(native.arena("cpu").compiled(), path)

    def test_processes_that_start_together_do_not_disturb_each_other(self) -> None:
        script = "import olla.run.native as n, torch; n.load('cpu'); print(torch.ones(3).sum().item())"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
        started = [
            subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
            for _ in range(3)
        ]
        self.assertEqual([process.communicate()[0] for process in started], ["3.0\n"] * 3)
        self.assertEqual(len(list((self.folder / "olla").iterdir())), 1)

    def test_a_cache_that_cannot_be_written_is_done_without(self) -> None:
        (self.folder / "olla").write_text("in the way")
        path = native.arena("cpu").compiled()
        self.addCleanup(shutil.rmtree, path.parent)
        self.addCleanup(compiling._folder_of_this_process.cache_clear)
        self.assertNotIn(self.folder, path.parents)

    def test_only_this_user_can_write_to_the_cache(self) -> None:
        path = native.arena("cpu").compiled()
        self.assertEqual([stat.S_IMODE(at.stat().st_mode) for at in (path.parent, path)], [0o700, 0o700])

    def test_a_library_in_a_directory_that_others_can_write_to_is_not_loaded(self) -> None:
        kept = native.arena("cpu").compiled()
        mine = kept.stat().st_uid
        for mode, user in ((0o770, mine), (0o707, mine), (0o1777, mine), (0o700, mine + 1)):
            kept.parent.chmod(mode)
            with (
                self.subTest(mode=oct(mode), user=user - mine),
                mock.patch("os.geteuid", return_value=user),
                self.assertLogs("olla", "WARNING") as logs,
            ):
                path = native.arena("cpu").compiled()
                self.addCleanup(shutil.rmtree, path.parent, ignore_errors=True)
                self.addCleanup(compiling._folder_of_this_process.cache_clear)
                self.assertNotIn(self.folder, path.parents)
                self.assertIn(str(kept.parent), logs.output[0])

    def test_a_library_that_others_can_write_to_is_compiled_anew(self) -> None:
        kept = native.arena("cpu").compiled()
        good = kept.read_bytes()
        kept.write_bytes(b"not a library")
        kept.chmod(0o770)
        self.assertEqual(native.arena("cpu").compiled().read_bytes(), good)
        self.assertEqual(stat.S_IMODE(kept.stat().st_mode), 0o700)

    def test_no_compiler(self) -> None:
        with (
            mock.patch.dict(os.environ, {"PATH": str(self.folder)}),
            self.assertRaisesRegex(NativeUnavailableError, "no C.. compiler was found: install g.."),
        ):
            os.environ.pop("CXX", None)
            native.arena("cpu").compiled()

    def test_a_compiler_that_is_not_there(self) -> None:
        with (
            mock.patch.dict(os.environ, {"CXX": "/nowhere/compiler"}),
            self.assertRaisesRegex(NativeUnavailableError, "/nowhere/compiler cannot be run"),
        ):
            native.arena("cpu").compiled()

    def test_a_compiler_that_fails_is_quoted(self) -> None:
        compiler = self.folder / "compiler"
        compiler.write_text("#!/bin/sh\necho it is too hot >&2\nexit 1\n")
        compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
        with (
            mock.patch.dict(os.environ, {"CXX": str(compiler)}),
            self.assertRaisesRegex(NativeUnavailableError, "it is too hot"),
        ):
            native.arena("cpu").compiled()
        self.assertEqual(list((self.folder / "olla").iterdir()), [])

    def test_other_platforms(self) -> None:
        with (
            mock.patch("sys.platform", "win32"),
            self.assertRaisesRegex(NativeUnavailableError, "not supported on win32"),
        ):
            native.load.__wrapped__("cpu")
        with self.assertRaisesRegex(NativeUnavailableError, "not supported on mps"):
            native.load.__wrapped__("mps")

    def test_two_libraries_in_one_process_share_nothing(self) -> None:
        symbols = subprocess.run(
            ["nm", "-DC", native.arena("cpu").compiled()], capture_output=True, text=True, check=True
        )
        self.assertIn(" T olla_install", symbols.stdout)
        self.assertNotRegex(symbols.stdout, " [uVW] .*olla::Registry")
