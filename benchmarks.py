"""The paper's table, executed: what OLLA does to the peak memory of real models.

    python benchmarks.py                              all models x batch 1 and 32 x train and eval, as in the paper
    python benchmarks.py --quick                      five models, three minutes
    python benchmarks.py -m resnet18 -b 1 --mode train
    python benchmarks.py --simulate                   planned only: no step is run, and nothing is allocated
    python benchmarks.py --gpu-profile                what the CUDA caching allocator loses, on a GPU if there is one
    python benchmarks.py --rematerialization          smaller and smaller byte budgets, kept by recomputing
    python benchmarks.py --spilling                   the same, kept by recomputing and by spilling to a file
    python benchmarks.py --ilp                        the paper's integer program, with every solver that is installed
    python benchmarks.py --peers                      PyTorch's own means to save memory, and OLLA within budgets
    python benchmarks.py --compile                    torch.compile, with each backend
    python benchmarks.py --soak                       10,000 steps: does memory grow?
    python benchmarks.py --write                      docs/results.md and the README's tables, from the logs

Every row plans one step of a model on the meta device, order and addresses, and compares the order with those that
PyTorch Inductor chooses among (least peak memory first, breadth first, depth first). "Reserved" is what the CUDA
caching allocator would take from the driver for two such steps, by the model of it in
olla/measure/caching_allocator.py: in eager PyTorch's order, in the planned one, and for the arena with the results,
which are outside of it. Where the step fits into memory, the planned and the eager step are then run side by side, in a
process of their own, and the allocator is asked for both peaks; above batch 1 only with --batch-size or --execute. The
planned step runs in an arena, at planned addresses. Weights are random: no download. A picture of the peaks is drawn
beside the log.
Ctrl-C keeps the rows that are done; with --append-log, a row that the log holds is shown, and not run again, unless
it failed or was run on another machine.
With --gpu-profile, both steps run op by op; on a GPU, "reserved" is measured, without one, what was recorded is
replayed through that model.
With --rematerialization, each step is planned and run within budgets that save 10, 25, 50 and 75 % of what eager
PyTorch needs above what lives across steps, and within the smallest budget that is found. With --spilling, tensors may
also go to a file in a folder beside the log, where that takes less time, or nothing else fits.
With --ilp, each form of the integer program is stated for each graph and given to each solver, starting from what the
planners found: the order, the addresses for it, both jointly, and, within a byte limit halfway between the planned peak
and what some op needs for itself, what to recompute and what to spill (at most 3 repeats; times of ops are estimated).
With --peers, three models of sizes of their own are trained by eager PyTorch, with optimizers that step in the
backward pass, with checkpoints, compiled, and by OLLA within byte budgets, in one process. Every peak is measured by
the same code; contenders take turns, two steps each, of which the second is timed, relative to that of eager PyTorch
in the same round. "Same numbers": after two steps, losses and parameters are those of eager PyTorch, bit for bit.
Figures and picture are beside the log, as .peers.csv and .peers.png, and --write takes them up.
With --compile, models are trained so, and run in inference, with torch.compile and its backends, OLLA's among them;
the log is beside the other one, as .compile.csv, and --write takes it up.
With --soak, one small step runs 10,000 times in this process, whose resident memory is noted every 100 steps, with
the allocations that missed their addresses; figures and picture are beside the log, as .soak.csv and .soak.png, and
--write takes them up.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import shlex
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypeVar

import torch

from bench import cells
from bench.backends import COMPILED, backends
from bench.comparison import SAVINGS, compare
from bench.contest import Result, show_contest
from bench.document import write_document
from bench.evidence import Evidence
from bench.ilp import FORMS, ILP, solve_form
from bench.log import read_log, set_aside, write_log
from bench.machine import machine
from bench.malloc import tune_malloc
from bench.models import MODELS, QUICK
from bench.peers import contenders
from bench.picture import draw_contests, draw_peaks, draw_soak
from bench.process import apart
from bench.profile import profile
from bench.row import Row
from bench.simulation import simulate
from bench.soak import STEPS, Moment, soak
from bench.summary import PAPER, SUMMARY_COLUMNS, summaries
from bench.table import show, show_table
from bench.training import SUBJECTS
from olla.errors import OllaError
from olla.solve import available

T = TypeVar("T")

ROOT = Path(__file__).parent
# Options that decide what a row holds, beside those that are its columns.
_DECIDING = ("execute", "gpu_profile", "profile_alloc_time", "skip_node_ordering", "skip_simulation", "spilling")
_DECIDING += ("tuned_malloc",)


def run_case(row: Row, options: argparse.Namespace) -> None:
    """Plan one case and, where it fits, run and measure it, in another process. Errors become part of the row."""
    try:
        if row.form:
            solve_form(row, options)
        elif "--simulate" in row.options.split():
            simulate(row, options)
        else:
            vars(row).update(vars(apart(_measured, row, options)))
    except Exception as error:  # one failing model must not end the run
        row.error = _told(error)
    gc.collect()


def _measured(row: Row, options: argparse.Namespace) -> Row:
    if options.tuned_malloc:
        tune_malloc()
    _ignore_warnings()
    try:
        (profile if options.gpu_profile else compare)(row, options)
    except Exception as error:
        row.error = _told(error)
    return row


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")


def _ignore_warnings() -> None:
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("-b", "--batch-size", type=int, action="append", help="may be repeated; default 1 and 32")
    parser.add_argument(
        "-m",
        "--model",
        choices=sorted({*MODELS, *SUBJECTS, *COMPILED}),
        action="append",
        metavar="NAME",
        help=f"may be repeated; default all; with --peers: {', '.join(SUBJECTS)}; "
        f"with --compile: {', '.join(COMPILED)}",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where steps are run and measured; default: a GPU, if there is one; with --peers and --compile, the CPU",
    )
    parser.add_argument("--mode", choices=("eval", "train"), action="append", help="may be repeated; default both")
    parser.add_argument("--log-path", type=Path, default=Path("benchmarks.csv"), help="default %(default)s")
    parser.add_argument(
        "--append-log", action="store_true", help="go on: keep the rows that the log holds already, and run the others"
    )
    parser.add_argument("--skip-simulation", action="store_true", help="only measure, at any batch size")
    parser.add_argument("--skip-node-ordering", action="store_true", help="run the ops in program order")
    parser.add_argument(
        "--execute",
        action="store_true",
        help="run both sides and measure, at any batch size, even if the step does not seem to fit into memory",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"{', '.join(QUICK)} at batch 1 in training mode, unless said otherwise"
    )
    parser.add_argument("--simulate", action="store_true", help="plan only, on the meta device")
    parser.add_argument(
        "--gpu-profile",
        action="store_true",
        help="what is allocated and reserved, op by op (in a second file); reserved by a model, if there is no GPU",
    )
    parser.add_argument(
        "--profile-alloc-time",
        action="store_true",
        help="with --gpu-profile: time the step's allocations and releases, by PyTorch's CPU allocator and in an arena",
    )
    parser.add_argument(
        "--tuned-malloc",
        action="store_true",
        help="let glibc keep the memory it got, as a fast eager PyTorch does: the other half of an honest ratio",
    )
    parser.add_argument(
        "--ilp", action="store_true", help=f"solve the paper's integer program; {', '.join(ILP)}, unless said otherwise"
    )
    parser.add_argument(
        "--rematerialization",
        action="store_true",
        help="save 10, 25, 50, 75 %% of the peak, and all that can be",
    )
    parser.add_argument(
        "--spilling",
        action="store_true",
        help="the same, also by spilling to a file beside the log",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="what else saves memory, and OLLA, with a tuned malloc; a picture is drawn beside the log",
    )
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile, with OLLA and other backends, with a tuned malloc"
    )
    parser.add_argument("--soak", action="store_true", help="a small step, 10,000 times; a picture of resident memory")
    parser.add_argument("--form", choices=FORMS, action="append", help="with --ilp: may be repeated; default all")
    parser.add_argument("--solver", choices=("cpsat", "gurobi", "highs"), action="append", help="as --form")
    parser.add_argument(
        "--solve-seconds", type=float, default=60.0, help="with --ilp: the limit of each solver; default %(default)s"
    )
    parser.add_argument(
        "--write", action="store_true", help="write docs/results.md and the README's tables from the logs, and stop"
    )
    parser.add_argument("--list", action="store_true", help="print the names of the models and stop")
    return parser


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, in which nothing is left that makes no sense together."""
    parser = _parser()
    options = parser.parse_args(arguments)
    given = {name for name, value in vars(options).items() if value != parser.get_default(name)}
    if options.write and given - {"write", "log_path"}:
        parser.error("--write runs nothing: only --log-path goes with it")
    if options.soak and given - {"soak", "log_path"}:
        parser.error("--soak has a model of its own, on the CPU: only --log-path goes with it")
    options.contest = options.peers or options.compile
    measuring = options.execute or options.skip_simulation or options.skip_node_ordering
    measuring = measuring or (options.tuned_malloc and not options.contest)
    options.within_budgets = options.rematerialization or options.spilling
    others = [options.simulate, options.gpu_profile, options.ilp, options.within_budgets]
    others += [options.peers, options.compile]
    if sum(others) + bool(measuring) > 1 and any(others):
        parser.error(
            "--simulate, --gpu-profile, --rematerialization or --spilling, --ilp, --peers and --compile exclude each "
            "other, and how to measure"
        )
    if options.profile_alloc_time and not options.gpu_profile:
        parser.error("--profile-alloc-time needs --gpu-profile")
    if options.contest and (options.batch_size or options.mode or options.quick):
        parser.error(
            "--peers and --compile have batches of their own, in training: leave --batch-size, --mode and --quick out"
        )
    known = SUBJECTS if options.peers else COMPILED if options.compile else MODELS
    if unknown := [name for name in options.model or () if name not in known]:
        how = (
            "with --peers" if options.peers else "with --compile" if options.compile else "without --peers or --compile"
        )
        parser.error(f"--model {unknown[0]}: {how}, {', '.join(known)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU")
    if options.device == "cuda" and options.contest:
        parser.error("--peers and --compile count what PyTorch's CPU allocator gives: leave --device cuda out")
    options.device = options.device or ("cuda" if torch.cuda.is_available() and not options.contest else "cpu")
    if min(options.batch_size or [1]) < 1:
        parser.error("--batch-size must be positive")
    if not options.log_path.parent.is_dir():
        parser.error(f"--log-path {options.log_path}: there is no folder {options.log_path.parent}")
    return options


def _cases(options: argparse.Namespace, command: str) -> list[Row]:
    names = options.model or list(QUICK if options.quick else ILP if options.ilp else MODELS)
    batches = options.batch_size or ([1] if options.quick else [1, 32])
    modes = options.mode or (["train"] if options.quick or options.ilp or options.within_budgets else ["train", "eval"])
    made = _made(options.device, command)
    given = [f"--{name.replace('_', '-')}" for name in _DECIDING if getattr(options, name)]
    given += [f"--solve-seconds {options.solve_seconds:g}"] * options.ilp
    cases = [
        Row(*case, options=" ".join(given), device=options.device, **made) for case in product(names, batches, modes)
    ]
    if options.ilp:
        tasks = list(product(options.form or FORMS, options.solver or available()))
        return [replace(case, device=None, form=form, solver=solver) for case in cases for form, solver in tasks]
    if options.within_budgets:
        return [replace(case, wanted_saving=saving) for case in cases for saving in SAVINGS]
    at_any_batch = options.batch_size or options.execute or options.skip_simulation or options.gpu_profile
    planned_only = {"device": None, "options": " ".join([*given, "--simulate"])}
    return [
        replace(case, **planned_only) if options.simulate or not (at_any_batch or case.batch_size == 1) else case
        for case in cases
    ]


def _run_cases(options: argparse.Namespace, command: str) -> list[Row]:
    log = _log_before(options.log_path, Row, options.append_log)
    known = {row.case: row for row in log if not row.error}
    cases = [known.get(case.case, case) for case in _cases(options, command)]
    if options.gpu_profile and not options.append_log:
        set_aside(options.log_path.with_suffix(".ops.csv"))

    def run(row: Row) -> None:
        nonlocal log
        if row.case not in known:
            with _interrupts():
                run_case(row, options)
            log = [other for other in log if other.case != row.case] + [row]
            write_log(log, options.log_path)

    show(cases, run)
    _show_summary(cases, options)
    return cases


def _show_summary(rows: list[Row], options: argparse.Namespace) -> None:
    if found := summaries(rows):
        show_table("Means over the models, simulated", SUMMARY_COLUMNS, found)
        print(PAPER)
    if options.ilp:
        print(
            "For comparison, a claim of the authors of MODeL, with Gurobi on a larger machine, not measured here:\n"
            "order and addresses of their models in less than 7 seconds (median)."
        )
    also = f", those of each operator in {options.log_path.with_suffix('.ops.csv')}" if options.gpu_profile else ""
    if drawn := [row for row in rows if not (row.error or row.form or row.wanted_saving)]:
        draw_peaks(drawn, options.log_path.with_suffix(".png"))
        also += f", a picture of the peaks in {options.log_path.with_suffix('.png')}"
    print(f"The figures are in {options.log_path}{also}.")


@contextmanager
def _interrupts() -> Iterator[None]:
    """Ctrl-C ends what is inside, even if a planner took it as the wish for what it had found so far."""
    heard: list[int] = []

    def stop(number: int, frame: object) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if heard:
        raise KeyboardInterrupt


def _run_contests(options: argparse.Namespace, command: str) -> list[Result]:
    log_path = _contest_path(options)
    subjects, modes = (COMPILED, ("train", "eval")) if options.compile else (SUBJECTS, ("train",))
    made = _made("cpu", command)
    results = _log_before(log_path, Result, options.append_log)
    for name, mode in product(options.model or subjects, modes):
        subject = subjects[name]
        if (name, mode) not in {(result.model, result.mode) for result in results}:
            entering = backends(mode) if options.compile else contenders(subject.budgets)
            result_of = partial(Result, name, mode, **made)
            rounds = 3 if options.compile else 9  # of taking times: the page has them for peers alone
            results += show_contest(f"{name}, {mode}", subject, entering, result_of, rounds)
            write_log(results, log_path)
    also = ""
    if options.peers:
        draw_contests(results, log_path.with_suffix(".png"))
        also = f", a picture of them in {log_path.with_suffix('.png')}"
    print(f"The figures are in {log_path}{also}.")
    return results


def _contest_path(options: argparse.Namespace) -> Path:
    return _beside(options.log_path, "compile" if options.compile else "peers")


def _made(device: str, command: str) -> dict[str, str]:
    """Where, when and how rows are made."""
    return {"machine": machine(device), "date": str(datetime.date.today()), "command": command}


def _beside(log_path: Path, kind: str) -> Path:
    """The log of contests and long runs."""
    return log_path.with_suffix(f".{kind}.csv")


def _run_soak(options: argparse.Namespace, command: str) -> None:
    path = _beside(options.log_path, "soak")
    _log_before(path, Moment, go_on=False)
    moments: list[Moment] = []
    for moment in soak(STEPS, partial(Moment, **_made("cpu", command))):
        moments.append(moment)
        write_log(moments, path)
        if moment.steps % 1000 == 0:
            print(f"{moment.steps:6,} steps: {cells.mebibytes(moment.resident_bytes)} MiB, {moment.missed} missed")
    draw_soak(moments, path.with_suffix(".png"))
    print(f"The figures are in {path}, a picture of them in {path.with_suffix('.png')}.")


def _log_before(path: Path, kind: type[T], go_on: bool) -> list[T]:
    """The rows of a log to go on with; if there is to be a new one, the one that is there is set aside."""
    if go_on:
        return _there(path, kind)
    if path.exists():
        print(f"{path}, which is there already, is kept as {set_aside(path)}.")
    return []


def _there(path: Path, kind: type[T]) -> list[T]:
    """The rows of a log; none, if it is not there."""
    return read_log(path, kind) if path.exists() else []


def _command(arguments: list[str]) -> str:
    """What was typed, but for where the log is, and whether it was there."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--log-path")
    parser.add_argument("--append-log", action="store_true")
    return shlex.join(["python", "benchmarks.py", *parser.parse_known_args(arguments)[1]])


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks; returns the exit status.

    0 if at least one case ran without an error, 1 if none did, 2 if the log, or what is to be written, is wrong, and
    130 after Ctrl-C.
    """
    options = _parse(arguments)
    if options.list:
        print("\n".join(MODELS))
        return 0
    if options.contest:
        tune_malloc()
    _ignore_warnings()
    try:
        if options.write:
            evidence = Evidence(
                _there(options.log_path, Row),
                moments=_there(_beside(options.log_path, "soak"), Moment),
                peers=_there(_beside(options.log_path, "peers"), Result),
                compiled=_there(_beside(options.log_path, "compile"), Result),
            )
            written = write_document(evidence, ROOT)
            print("Written: " + ", ".join(map(str, written)))
            return 0
        command = _command(sys.argv[1:] if arguments is None else arguments)
        if options.soak:
            _run_soak(options, command)
            return 0
        done = _run_contests(options, command) if options.contest else _run_cases(options, command)
    except OllaError as error:
        print(f"benchmarks.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if options.soak:
            print("Stopped.")
            return 130
        log_path = _contest_path(options) if options.contest else options.log_path
        print(f"Stopped. What was done is in {log_path}; to go on, give the same options and --append-log.")
        return 130
    return 0 if any(not row.error for row in done) else 1


if __name__ == "__main__":
    sys.exit(main())
