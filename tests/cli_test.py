from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from command import run_main
from graphs import diamond

import olla


class CommandLineTest(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.graph = self.folder / "graph.json"
        self.plan = self.folder / "plan.json"
        diamond().save(self.graph)

    def test_place_writes_offsets_and_a_picture(self) -> None:
        table, out, picture = (self.folder / name for name in ("in.csv", "out.csv", "out.png"))
        table.write_text("id,lower,upper,size\na,0,2,3\nb,1,3,4\n")
        status, text, _ = run_main("place", table, "--out", out, "--draw", picture)
        self.assertEqual(status, 0)
        self.assertIn("7 bytes", text)
        self.assertIn("optimal, gap 0.0000%", text)
        offsets = [int(line.split(",")[-1]) for line in out.read_text().splitlines()[1:]]
        self.assertEqual(sorted(offsets), [0, 3] if offsets[0] == 0 else [0, 4])
        self.assertTrue(picture.read_bytes().startswith(b"\x89PNG"))

    def test_a_plan_can_have_addresses(self) -> None:
        status, text, _ = run_main("plan", self.graph, "--place", "--alignment", 1, "--out", self.plan)
        self.assertEqual(status, 0)
        self.assertIn("0.0000% of it fragmentation", text)
        self.assertIsNotNone(olla.Plan.load(self.plan).offsets)
        self.assertEqual(run_main("check", self.graph, self.plan)[0], 0)
        self.assertEqual(run_main("plan", self.graph, "--place", "--alignment", 0)[0], 2)

    def test_a_plan_can_be_left_to_a_solver(self) -> None:
        status, text, _ = run_main("plan", self.graph, "--place", "--solver", "auto", "--alignment", 1)
        self.assertEqual(status, 0)
        self.assertIn("optimal, gap 0.0000%", text)
        status, _, error = run_main("plan", self.graph, "--solver", "abacus")
        self.assertEqual(status, 2)
        self.assertIn("no such solver: 'abacus'", error)

    def test_a_graph_is_drawn_with_the_steps_of_its_plan(self) -> None:
        import pydot

        run_main("plan", self.graph, "--out", self.plan)
        out = self.folder / "graph.dot"
        self.assertEqual(run_main("draw", self.graph, out, "--plan", self.plan)[0], 0)
        [drawing] = pydot.graph_from_dot_file(str(out))
        labels = {node.get_name(): node.get_label() for node in drawing.get_nodes()}
        self.assertEqual(labels["op2"], '"2: narrow"')
        self.assertEqual(labels["storage0"], '"weight\\n100 bytes"')
        arrows = [(edge.get_source(), edge.get_destination(), edge.get_label()) for edge in drawing.get_edges()]
        self.assertIn(("op1", "op3", '"wide\\n10 bytes"'), arrows)
        self.assertIn(("op4", "outputs", '"end\\n2 bytes"'), arrows)
        [red] = [node.get_name() for node in drawing.get_nodes() if node.get_fillcolor()]
        self.assertEqual(red, "op2")  # start 4, wide 10, narrow 1

    def test_a_plan_is_drawn_as_its_file_is_named(self) -> None:
        run_main("plan", self.graph, "--place", "--alignment", 1, "--out", self.plan)
        page, picture, arena = (self.folder / name for name in ("plan.html", "plan.svg", "arena.svg"))
        for out, what in ((page, ()), (picture, ()), (arena, ("--what", "addresses"))):
            status, text, _ = run_main("draw", self.graph, out, "--plan", self.plan, *what)
            self.assertEqual((status, text), (0, f"6 ops and 6 storages are in {out}\n"))
        self.assertIn('"arena":15', page.read_text())
        self.assertIn("<!-- peak 15.00 at step 2 -->", picture.read_text())
        self.assertIn("of it fragmentation", arena.read_text())
        for out, message in ((page, "nothing without a plan"), (self.folder / "plan.txt", "known endings: .dot")):
            status, _, error = run_main("draw", self.graph, out)
            self.assertEqual(status, 2)
            self.assertIn(message, error)

    @unittest.skipUnless(shutil.which("dot"), "Graphviz is not installed")
    def test_a_graph_is_drawn_by_graphviz(self) -> None:
        picture = self.folder / "graph.svg"
        self.assertEqual(run_main("draw", self.graph, picture)[0], 0)
        self.assertIn("<svg", picture.read_text())

    def test_without_graphviz_a_picture_is_an_error_and_dot_is_not(self) -> None:
        with mock.patch.dict(os.environ, PATH=""):
            status, _, error = run_main("draw", self.graph, self.folder / "graph.svg")
            self.assertEqual(status, 2)
            self.assertIn("install Graphviz, or write .dot", error)
            self.assertEqual(run_main("draw", self.graph, self.folder / "graph.dot")[0], 0)

    def test_integer_programs_are_written(self) -> None:
        for form, families in {
            "order": ("created_once", "continuity", "inputs_present", "resident_set"),
            "address": ("together", "address", "arena"),
            "joint": ("created_once", "resident_set", "together", "address", "arena"),
        }.items():
            for ending in ("lp", "mps"):
                out = self.folder / f"{form}.{ending}"
                status, text, _ = run_main("model", self.graph, out, "--form", form)
                self.assertEqual(status, 0)
                self.assertRegex(text, r"[1-9]\d* variables and [1-9]\d* rows")
                for family in families:
                    self.assertIn(f"{family}(0)", out.read_text())
        self.assertEqual(run_main("model", self.graph, self.folder / "model.txt")[0], 2)

    def test_place_says_what_does_not_fit_and_what_is_wrong(self) -> None:
        table = self.folder / "in.csv"
        table.write_text("id,lower,upper,size\na,0,2,3\nb,1,3,4\n")
        status, _, error = run_main("place", table, "--capacity", 6)
        self.assertEqual(status, 1)
        self.assertIn("at least 7 are needed", error)
        table.write_text("id,lower,upper,size\na,0,2,-3\n")
        status, _, error = run_main("place", table)
        self.assertEqual(status, 2)
        self.assertIn("line 2: buffer 'a' has the negative size -3", error)
        self.assertEqual(run_main("place", self.folder / "missing.csv")[0], 2)
        table.write_text("id,lower,upper,size\na,0,2,3\n")
        self.assertEqual(run_main("place", table, "--draw", self.folder / "picture.what")[0], 2)

    def test_plan_prints_peak_bound_and_gap(self) -> None:
        status, out, _ = run_main("plan", self.graph)
        self.assertEqual(status, 0)
        self.assertIn("15 bytes", out)
        self.assertIn("optimal, gap 0.0000%", out)

    def test_plan_writes_a_plan_that_check_accepts(self) -> None:
        self.assertEqual(run_main("plan", self.graph, "--out", self.plan)[0], 0)
        self.assertEqual(run_main("check", self.graph, self.plan)[:2], (0, "The plan is sound.\n"))

    def test_plan_as_json(self) -> None:
        _, out, _ = run_main("plan", self.graph, "--json")
        self.assertEqual(olla.Plan.from_dict(json.loads(out)).peak_bytes, 15)

    def test_check_says_what_is_wrong(self) -> None:
        run_main("plan", self.graph, "--out", self.plan)
        data = json.loads(self.plan.read_text())
        data["peak_bytes"] -= 1
        self.plan.write_text(json.dumps(data))
        status, out, _ = run_main("check", self.graph, self.plan)
        self.assertEqual(status, 1)
        self.assertIn("14 bytes claimed, 15 needed", out)

    def test_bad_input_is_an_error_with_status_2(self) -> None:
        graph = diamond().to_dict()
        bad = {
            "is not JSON": "{",
            "not a graph": "[]",
            "negative size": json.dumps({**graph, "storages": [{"name": "x", "size": -1}]}),
            "names storage 7": json.dumps({**graph, "outputs": [7]}),
            "op 0 \\('begin'\\) touches storage 5": json.dumps({**graph, "ops": [{"name": "begin", "reads": [5]}]}),
            "holds 1.5 where an integer": json.dumps({**graph, "storages": [{"name": "x", "size": 1.5}]}),
        }
        for message, text in bad.items():
            self.graph.write_text(text)
            status, _, err = run_main("plan", self.graph)
            self.assertEqual(status, 2)
            self.assertRegex(err, message)
        status, _, err = run_main("plan", self.folder / "missing.json")
        self.assertEqual(status, 2)
        self.assertIn("missing.json", err)

    def test_it_needs_no_torch(self) -> None:
        code = "import sys; from olla.cli import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
        table = self.folder / "in.csv"
        table.write_text("id,lower,upper,size\na,0,2,3\n")
        commands = (
            ("plan", self.graph, "--place", "--out", self.plan),
            ("check", self.graph, self.plan),
            ("draw", self.graph, self.folder / "plan.html", "--plan", self.plan),
            ("place", table),
            ("plan", "--help"),
        )
        for command in commands:
            with self.subTest(command[0]):
                subprocess.run([sys.executable, "-c", code, *command], check=True, stdout=subprocess.DEVNULL)

    def test_options_of_models_are_not_for_graphs(self) -> None:
        for option in ("--inference", "--batch-size=2", "--budget=50%", "--spill-dir=.", "--device=cpu"):
            status, _, error = run_main("plan", self.graph, option)
            self.assertEqual(
                (status, error), (2, f"olla: {self.graph} is a graph: {option.split('=')[0]} is for models\n")
            )
        for command in ("frontier", "bench"):
            status, _, error = run_main(command, self.graph)
            self.assertEqual(status, 2)
            self.assertIn("is a graph, whose ops nobody can run or time: name a model", error)

    def test_the_package_runs_as_a_command(self) -> None:
        finished = subprocess.run([sys.executable, "-m", "olla", "plan", "--help"], check=True, capture_output=True)
        self.assertIn(b"GRAPH.json", finished.stdout)

    def test_the_help_of_each_command_has_examples_that_it_understands(self) -> None:
        for command in ("plan", "frontier", "bench", "check", "draw", "place", "model"):
            help_page = subprocess.run(
                [sys.executable, "-m", "olla", command, "--help"], check=True, capture_output=True
            )
            examples = help_page.stdout.decode().split("examples:\n")[1].splitlines()
            self.assertTrue(examples)
            for example in examples:
                olla_, name, _, *others = example.split(">")[0].split()
                self.assertEqual((olla_, name), ("olla", command))
                status, _, error = run_main(name, self.folder / "missing.json", *others)
                self.assertEqual(status, 2)  # of what is understood, and not there
                self.assertIn("missing.json", error)


class SaveTest(unittest.TestCase):
    def test_a_graph_comes_back_from_its_file(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.json"
            diamond().save(path)
            self.assertEqual(olla.Graph.load(path), diamond())

    def test_schedule_is_public(self) -> None:
        self.assertEqual(olla.schedule(diamond()).peak_bytes, 15)
