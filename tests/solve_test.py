"""Integer programs: every solver gives the same exact answers, and no wrong answer gets through."""

from __future__ import annotations

import _thread
import os
import subprocess
import sys
import tempfile
import unittest
from importlib.util import find_spec
from itertools import product
from math import inf, isnan
from pathlib import Path
from threading import Timer
from unittest import mock

import numpy as np
from graphs import settings  # sets the profile
from hypothesis import given
from hypothesis import strategies as st
from interrupts import heed_interrupts

from olla import InvalidModelError, SolverUnavailableError
from olla.solve import Model, Result, Status, available, highs, solve, solver
from olla.solve.run import Answer

MODULES = ("gurobipy", "highspy", "ortools.sat.python.cp_model")
LICENSED = solver._is_licensed()


def knapsack(values: list[int], weights: list[int], capacity: int) -> Model:
    model = Model()
    take = model.binaries("take", len(values))
    model.constrain("weight", 0, take, weights, "<=", capacity)
    model.minimize(take, -np.array(values))
    return model


def market_split() -> Model:
    """Sell products so that each of 5 markets is halved: out of reach for all (Cornuejols and Dawande, 1998)."""
    demand = np.random.default_rng(1).integers(0, 100, (5, 40))
    model = Model()
    model.constrain("market", np.arange(5)[:, None], model.binaries("sell", 40), demand, "==", demand.sum(1) // 2)
    return model


def nearly_split() -> tuple[Model, np.ndarray]:
    """The same, as close to the half as possible; and something feasible."""
    demand = np.random.default_rng(1).integers(0, 100, (5, 40))
    half = demand.sum(1) // 2
    model = Model()
    rows, sell = np.arange(5), model.binaries("sell", 40)
    missing, spare = model.integers("missing", 5, 0, half), model.integers("spare", 5, 0, half)
    columns = np.concatenate([np.broadcast_to(sell, (5, 40)), missing[:, None], spare[:, None]], 1)
    coefficients = np.concatenate([demand, np.full((5, 1), 1), np.full((5, 1), -1)], 1)
    model.constrain("market", rows[:, None], columns, coefficients, "==", half)
    model.minimize([*missing, *spare], 1)
    return model, np.concatenate([np.zeros(40), half, np.zeros(5)])


@st.composite
def small_models(draw: st.DrawFn) -> Model:
    """A few integer variables, of any sign, in a few rows."""
    count, rows = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    numbers = st.integers(-6, 6)
    lower = np.array(draw(st.lists(st.integers(-3, 1), min_size=count, max_size=count)))
    model = Model()
    x = model.integers("x", count, lower, lower + draw(st.integers(0, 3)))
    for _ in range(rows):
        coefficients = draw(st.lists(numbers, min_size=count, max_size=count))
        model.constrain("row", 0, x, coefficients, draw(st.sampled_from(("<=", "==", ">="))), draw(numbers))
    model.minimize(x, draw(st.lists(numbers, min_size=count, max_size=count)))
    if draw(st.booleans()):
        model.hint(x[: draw(st.integers(0, count))], 0)
    return model


def subset_sums(sizes: list[int]) -> list[int]:
    return [sum(s for s, taken in zip(sizes, t, strict=True) if taken) for t in product((0, 1), repeat=len(sizes))]


def brute_force(model: Model) -> float:
    """The best objective; inf: infeasible."""
    problem = model.problem()
    ranges = [range(int(low), int(high) + 1) for low, high in zip(problem.lower, problem.upper, strict=True)]
    best = inf
    for values in product(*ranges):
        sums = problem.matrix.toarray() @ values
        if (problem.row_lower <= sums).all() and (sums <= problem.row_upper).all():
            best = min(best, float(problem.cost @ values))
    return best


class Cases:
    """What every solver has to answer."""

    name: str
    takes_fractions = True

    def solve(self, model: Model, **options: object) -> Result:
        result = solve(model, self.name, **options)  # type: ignore[arg-type]
        assert result.solver == self.name
        assert result.seconds >= 0
        if result.values is not None:
            assert model.problem().violation(result.values) is None
            assert result.objective == model.problem().objective(result.values)
            assert result.bound <= result.objective
        return result

    def optimum(self, model: Model, **options: object) -> float:
        result = self.solve(model, **options)
        self.assertEqual(result.status, Status.OPTIMAL)
        return result.objective

    def test_a_knapsack_is_filled_as_well_as_possible(self) -> None:
        self.assertEqual(self.optimum(knapsack([5, 3, 3], [4, 3, 2], 5)), -6)

    def test_an_assignment_is_the_cheapest(self) -> None:
        cost = np.array([[4, 1, 3], [2, 0, 5], [3, 2, 2]])
        model = Model()
        chosen = model.binaries("chosen", 9).reshape(3, 3)
        model.constrain("worker", np.arange(3)[:, None], chosen, 1, "==", 1)
        model.constrain("task", np.arange(3)[:, None], chosen.T, 1, "==", [1, 1, 1])
        model.minimize(chosen, cost)
        result = self.solve(model)
        self.assertEqual((result.status, result.objective, result.gap), (Status.OPTIMAL, 5, 0.0))
        self.assertEqual(result.values[chosen].tolist(), [[0, 1, 0], [1, 0, 0], [0, 0, 1]])

    def test_small_models_agree_with_brute_force(self) -> None:
        @settings(max_examples=60)
        @given(small_models())
        def agrees(model: Model) -> None:
            best, result = brute_force(model), self.solve(model, threads=1)
            self.assertEqual(result.status, Status.INFEASIBLE if best == inf else Status.OPTIMAL)
            self.assertEqual((result.objective, result.gap), (best, inf if best == inf else 0.0))

        agrees()

    def test_what_cannot_be_is_infeasible(self) -> None:
        model = Model()
        x = model.integers("x", 2, -9, 9)
        model.constrain("odd", 0, x, 2, "==", 3)
        result = self.solve(model)
        self.assertEqual((result.status, result.values, result.objective), (Status.INFEASIBLE, None, inf))
        self.assertEqual(result.gap, inf)

    def test_what_has_no_end_is_unbounded(self) -> None:
        model = Model()
        x = model.integers("x", 2, -inf, inf)
        model.constrain("near", 0, x, [1, -1], "<=", 3)
        model.minimize(x[0], -1)
        if not self.takes_fractions:
            with self.assertRaisesRegex(InvalidModelError, r"x\(0\)"):
                self.solve(model)
            return
        self.assertEqual(self.solve(model).status, Status.UNBOUNDED)
        model.constrain("odd", 0, [*x, *model.integers("y", 2, 0, 9)], [0, 0, 2, 2], "==", 3)
        self.assertEqual(self.solve(model).status, Status.INFEASIBLE)

    def test_bounds_may_be_negative(self) -> None:
        model = Model()
        x = model.integers("x", 3, [-7, -3, 2], [-2, 4, 5])
        model.constrain("sum", 0, x, [1, 1, 1], ">=", -3)
        model.minimize(x, [3, 2, 1])
        self.assertEqual(self.optimum(model), 3 * -7 + 2 * -1 + 5)

    def test_a_model_may_have_no_rows_or_nothing_at_all(self) -> None:
        self.assertEqual(self.optimum(Model()), 0)
        model = Model()
        model.minimize(model.integers("x", 2, -5, 9), [1, -1])
        self.assertEqual(self.optimum(model), -14)

    def test_sums_of_large_numbers_are_exact(self) -> None:
        sizes = [2**40 + 2**28 * (2**k + k) + k for k in range(8)]
        capacity = 3 * 2**40 + 2**28 * 151
        best = max(s for s in subset_sums(sizes) if s <= capacity)
        self.assertEqual(self.optimum(knapsack(sizes, sizes, capacity)), -best)

    def test_nothing_wrong_is_claimed_where_floats_are_too_coarse(self) -> None:
        sizes = [2**40 + 2**k + k for k in range(8)]
        capacity = 3 * 2**40 + 151
        best = max(s for s in subset_sums(sizes) if s <= capacity)
        result = self.solve(knapsack(sizes, sizes, capacity))
        self.assertLessEqual(result.bound, -best)
        self.assertGreaterEqual(result.objective, -best)
        if not self.takes_fractions:
            self.assertEqual((result.status, result.objective, result.bound), (Status.OPTIMAL, -best, -best))

    def test_nothing_is_called_a_solution_that_misses_by_one(self) -> None:
        model = Model()
        x = model.binaries("x", 9)
        sizes = [2**40 + 2 * k for k in range(9)]
        model.constrain("odd", 0, x, sizes, "==", sum(sizes[:4]) + 1)
        result = self.solve(model)
        self.assertIsNone(result.values)
        self.assertIn(result.status, (Status.INFEASIBLE, Status.INEXACT))

    def test_continuous_variables_are_solved_or_refused(self) -> None:
        model = Model()
        x, y = model.continuous("x", 1, -1.5, 8), model.integers("y", 1, 0, 8)
        model.constrain("row", 0, [x, y], [[2], [0.5]], ">=", 1.25)
        model.minimize([x, y], [[1], [1]])
        if self.takes_fractions:
            self.assertAlmostEqual(self.optimum(model), 0.625)
        else:
            with self.assertRaisesRegex(InvalidModelError, r"x\(0\) is continuous"):
                self.solve(model)

    def test_a_fraction_in_a_row_of_integers_is_solved_or_refused(self) -> None:
        model = Model()
        x = model.integers("x", 2, 0, 9)
        model.constrain("row", 0, x, [1, 0.3], ">=", 0.5)
        model.minimize(x, [5, 1])
        if self.takes_fractions:
            self.assertEqual(self.optimum(model), 2)
        else:
            with self.assertRaisesRegex(InvalidModelError, r"row\(0\) is 0.3"):
                self.solve(model)

    def test_a_linear_program_is_solved_or_refused(self) -> None:
        model = Model()
        x = model.continuous("x", 2, 0, 9)
        model.constrain("row", 0, x, 1, ">=", 2)
        model.minimize(x, [1, 2])
        if self.takes_fractions:
            self.assertAlmostEqual(self.optimum(model), 2)

    def test_hints_good_and_bad_lead_to_the_same_optimum(self) -> None:
        model = knapsack([5, 3, 3], [4, 3, 2], 5)
        for hint in ([0, 1, 1], [1, 0, 0], [1, 1, 1], [7, -3, 0.4]):
            model.hint(np.arange(3), hint)
            self.assertEqual(self.optimum(model), -6)
        model.hint([1], [0])
        self.assertEqual(self.optimum(model), -6)

    def test_a_hint_is_a_solution_when_time_runs_out(self) -> None:
        model, start = nearly_split()
        model.hint(np.arange(len(start)), start)
        result = self.solve(model, time_limit=0.0)
        self.assertEqual(result.status, Status.FEASIBLE)
        self.assertLessEqual(result.objective, start[40:].sum())
        self.assertGreater(result.gap, 0)

    def test_time_runs_out_with_a_solution(self) -> None:
        model, start = nearly_split()
        model.hint(np.arange(len(start)), start)
        self.assertEqual(self.solve(model, time_limit=0.3).status, Status.FEASIBLE)

    def test_time_runs_out_without_a_solution(self) -> None:
        result = self.solve(market_split(), time_limit=0.3)
        self.assertEqual((result.status, result.values, result.objective), (Status.NO_SOLUTION, None, inf))

    def test_within_the_gap_is_good_enough(self) -> None:
        rng = np.random.default_rng(0)
        model = knapsack(rng.integers(90, 100, 60).tolist(), rng.integers(90, 100, 60).tolist(), 2_000)
        result = self.solve(model, gap=0.2)
        self.assertEqual(result.status, Status.OPTIMAL)
        self.assertLessEqual(result.gap, 0.2)

    def test_progress_is_told_in_order(self) -> None:
        calls: list[tuple[float, float, float]] = []
        model, start = nearly_split()
        model.hint(np.arange(len(start)), start)
        result = self.solve(model, time_limit=0.3, progress=lambda *call: calls.append(call))
        self.assertTrue(calls)
        for objective, bound, _ in calls:
            self.assertLessEqual(bound, objective)
        seconds = [call[2] for call in calls]
        self.assertEqual(seconds, sorted(seconds))
        self.assertEqual(calls[-1][0], result.objective)

    def test_a_stop_returns_the_best_so_far(self) -> None:
        model, start = nearly_split()
        model.hint(np.arange(len(start)), start)
        result = self.solve(model, progress=mock.Mock(side_effect=KeyboardInterrupt))
        self.assertEqual(result.status, Status.FEASIBLE)

    def test_a_stop_without_a_solution_is_raised(self) -> None:
        heed_interrupts(self)
        timer = Timer(0.3, _thread.interrupt_main)
        timer.start()
        with self.assertRaises(KeyboardInterrupt):
            self.solve(market_split())
        timer.join()

    def test_what_progress_raises_is_raised(self) -> None:
        with self.assertRaisesRegex(ValueError, "mine"):
            self.solve(nearly_split()[0], progress=mock.Mock(side_effect=ValueError("mine")))

    def test_one_thread_and_one_seed_give_one_solution(self) -> None:
        rng = np.random.default_rng(0)
        model = Model()
        x = model.binaries("x", 20)
        model.constrain("row", np.arange(3)[:, None], x, rng.integers(0, 9, (3, 20)), "<=", 30)
        model.minimize(x, -rng.integers(1, 4, 20))
        first, second = (self.solve(model, seed=3, threads=1).values.tolist() for _ in range(2))
        self.assertEqual(first, second)


@unittest.skipUnless(find_spec("ortools"), "OR-Tools is not installed")
class CpSatTest(Cases, unittest.TestCase):
    name = "cpsat"
    takes_fractions = False

    def test_sums_beyond_64_bits_are_refused(self) -> None:
        model = Model()
        x = model.integers("x", 2, 0, 2**40)
        model.constrain("row", 0, x, 2**40, "<=", 2**50)
        with self.assertRaisesRegex(InvalidModelError, "overflow"):
            self.solve(model)


@unittest.skipUnless(find_spec("highspy"), "HiGHS is not installed")
class HighsTest(Cases, unittest.TestCase):
    name = "highs"

    def test_a_coefficient_that_is_too_large_is_refused(self) -> None:
        with self.assertRaisesRegex(InvalidModelError, "too large"):
            self.solve(knapsack([1, 1], [2**52, 1], 1))

    def test_nothing_is_printed(self) -> None:
        """C prints past ``sys.stdout``, when the process ends. HiGHS 1.12 did so for four of these models."""
        script = (
            "import numpy as np\n"
            "from olla.solve import Model, solve\n"
            "for seed in range(30):\n"
            "    rng, model = np.random.default_rng(seed), Model()\n"
            "    x = np.concatenate([model.binaries('x', 12), model.continuous('y', 2, 0, 100)])\n"
            "    for row in range(4):\n"
            "        weights = rng.integers(-2**30, 2**30, 14).tolist()\n"
            "        model.constrain(f'row{row}', np.zeros(14, int), x, weights, '>=', -2**28)\n"
            "    model.minimize(x, rng.integers(-100, 100, 14).tolist())\n"
            "    solve(model, 'highs', time_limit=10, threads=1)\n"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, check=True)
        self.assertEqual(done.stdout, b"")

    def test_a_written_model_has_the_same_names_and_optimum(self) -> None:
        import highspy

        model = knapsack([2**45, 3, 3], [2**45 + 1, 3, 2], 2**45 + 3)
        model.constrain("fixed", 0, model.continuous("free", 1, -inf, inf), 1, "==", -2)
        with tempfile.TemporaryDirectory() as folder:
            for ending in ("lp", "mps"):
                path = Path(folder, f"model.{ending}")
                model.write(path)
                reader = highs._silent(highspy)
                self.assertEqual(reader.readModel(str(path)), highspy.HighsStatus.kOk)
                self.assertEqual(set(reader.getLp().col_names_), {"take(0)", "take(1)", "take(2)", "free(0)"})
                self.assertEqual(set(reader.getLp().row_names_), {"weight(0)", "fixed(0)"})
                reader.run()
                self.assertEqual(reader.getInfo().objective_function_value, self.optimum(model))
            with self.assertRaisesRegex(InvalidModelError, "cannot write"):
                model.write(Path(folder, "model.txt"))


@unittest.skipUnless(find_spec("gurobipy"), "gurobipy is not installed")
class GurobiTest(Cases, unittest.TestCase):
    name = "gurobi"

    @unittest.skipIf(LICENSED, "Gurobi has a licence for large models")
    def test_a_model_too_large_for_the_licence_says_so(self) -> None:
        with self.assertRaisesRegex(SolverUnavailableError, "2,001 variables.*pip install"):
            self.solve(knapsack([1] * 2_001, [1] * 2_001, 7))

    @unittest.skipIf(LICENSED, "Gurobi has a licence for large models")
    @unittest.skipUnless(find_spec("ortools") or find_spec("highspy"), "no other solver is installed")
    def test_auto_takes_another_solver_if_the_licence_is_too_small(self) -> None:
        with mock.patch.object(solver, "_is_licensed", return_value=True):
            result = solve(knapsack([1] * 2_001, [1] * 2_001, 7))
            self.assertEqual(solve(knapsack([1], [1], 7)).solver, "gurobi")
        self.assertNotEqual(result.solver, "gurobi")
        self.assertEqual(result.objective, -7)
        self.assertIn("licence", result.note)


class SolverTest(unittest.TestCase):
    @unittest.skipUnless(find_spec("ortools") and find_spec("highspy"), "OR-Tools or HiGHS is not installed")
    def test_auto_takes_what_suits_the_model(self) -> None:
        with mock.patch.object(solver, "_is_licensed", return_value=False):
            model = knapsack([1], [1], 1)
            self.assertEqual(solve(model).solver, "cpsat")
            model.continuous("y", 1)
            self.assertEqual(solve(model).solver, "highs")

    def test_there_is_no_other_solver(self) -> None:
        with self.assertRaisesRegex(SolverUnavailableError, "auto, cpsat, gurobi, highs"):
            solve(Model(), "abacus")

    def test_a_missing_package_says_how_to_install_it(self) -> None:
        with mock.patch.dict(sys.modules, dict.fromkeys((*MODULES, "ortools"))):
            self.assertEqual(available(), [])
            for name, package in (("cpsat", "ortools"), ("gurobi", "gurobipy"), ("highs", "highspy")):
                with self.assertRaisesRegex(SolverUnavailableError, f"pip install {package}"):
                    solve(Model(), name)
            with self.assertRaisesRegex(SolverUnavailableError, "pip install highspy"):
                solve(Model())

    def test_a_solver_that_lies_is_found_out(self) -> None:
        model = knapsack([5, 3, 3], [4, 3, 2], 5)
        for values, bound, status in (
            ([0, 1, 1], -6, Status.OPTIMAL),
            ([0, 1e-7, 1 - 1e-7], -3, Status.OPTIMAL),
            ([1, 1, 0], -8, Status.INEXACT),
            ([0, 0, 1], -6, Status.FEASIBLE),
            ([0, 0.5, float("nan")], -6, Status.INEXACT),
        ):
            answer = Answer(Status.OPTIMAL, np.array(values, float), bound)
            with mock.patch.object(highs, "solve", return_value=answer):
                result = solve(model, "highs")
            self.assertEqual(result.status, status)
            self.assertEqual(result.values is None, status is Status.INEXACT)
            self.assertEqual("solution is none" in result.note, status is Status.INEXACT)


class ModelTest(unittest.TestCase):
    def test_families_name_what_is_in_them(self) -> None:
        model = Model()
        model.binaries("a", 2)
        model.binaries("b", 1)
        self.assertEqual(model.binaries("a", 2).tolist(), [3, 4])
        self.assertEqual(list(model.problem().variables), ["a(0)", "a(1)", "b(0)", "a(2)", "a(3)"])

    def test_triplets_of_one_place_add_up(self) -> None:
        model = Model()
        x = model.integers("x", 2)
        model.constrain("r", [0, 0, 2, 0], [x[0], x[1], x[1], x[0]], [1, 2, 3, 4], "<=", 5)
        self.assertEqual(model.problem().matrix.toarray().tolist(), [[5, 2], [0, 0], [0, 3]])
        self.assertEqual(model.problem().row_upper.tolist(), [5, 5, 5])

    def test_a_hint_may_be_partial_and_replaced(self) -> None:
        model = Model()
        model.integers("x", 2)
        model.hint([0, 1], 3)
        model.hint([1], 4)
        hint = model.problem().hint
        self.assertTrue(isnan(hint[0]))
        self.assertEqual(hint[1], 4)

    def test_what_makes_no_sense_is_an_error(self) -> None:
        model = Model()
        x = model.integers("x", 2)
        for wrong in (
            lambda: model.integers("y", 1, 2, 1),
            lambda: model.integers("y", 1, 0, float("nan")),
            lambda: model.constrain("r", 0, [2], 1, "<=", 1),
            lambda: model.constrain("r", [0, 2], x, 1, "<=", [1, 1]),
            lambda: model.constrain("r", 0, x, 2**53, "<=", 1),
            lambda: model.constrain("r", 0, x, 1, "<=", inf),
            lambda: model.minimize([-1], 1),
            lambda: model.hint(x, float("nan")),
        ):
            with self.assertRaises(InvalidModelError):
                wrong()

    def test_sums_are_exact_beyond_floats(self) -> None:
        model = Model()
        x = model.integers("x", 3, -(2**52), 2**52)
        model.constrain("r", 0, x, [2**52, -(2**52), 1], "==", 1)
        problem = model.problem()
        self.assertIsNone(problem.violation(np.array([2.0**52, 2.0**52, 1])))
        self.assertRegex(problem.violation(np.array([2.0**52, 2.0**52, 2])), r"r\(0\) is 2, not within \[1, 1\]")
        self.assertRegex(problem.violation(np.array([2.0**52, 0, 1])), r"r\(0\) is")
        self.assertRegex(problem.violation(np.array([0, 0, 2.0**53])), r"x\(2\) is")


if __name__ == "__main__":
    unittest.main()
