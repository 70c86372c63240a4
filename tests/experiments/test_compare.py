# SPDX-License-Identifier: Apache-2.0
"""What a comparison runs and what it writes, with jobs that only pretend to run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from fedfusion_flwr.errors import FedFusionError
from fedfusion_flwr.experiments import compare
from fedfusion_flwr.experiments.compare import Comparison
from fedfusion_flwr.experiments.jobs import Job, locked
from fedfusion_flwr.experiments.rows import Row, append_row, read_rows
from fedfusion_flwr.experiments.suite import SuiteError, parse_suite
from fedfusion_flwr.experiments.work import Machine

SUITE = """
keep = ["config.json"]

[tune]
datasets = ["mnist-5k"]
models = ["lenet"]
partitions = ["dirichlet"]
seeds = [100]
[tune.candidates]
fedavg = [{ learning-rate = 0.1 }, { learning-rate = 0.2 }]

[[groups]]
name = "main"
strategies = ["fedavg", "fedbn"]
datasets = ["mnist-5k"]
models = ["lenet"]
partitions = ["iid"]
seeds = [0, 1]
seconds = 2

[[groups]]
name = "other"
strategies = ["fedavg"]
datasets = ["mnist-5k"]
models = ["lenet"]
partitions = ["iid"]
seeds = [0]
seconds = 4
tuned = false

[centralized]
groups = ["main"]
seeds = [0]
"""
CHANGED = SUITE.replace("[[groups]]", "[strategies.fedbn]\nmomentum = 0.5\n\n[[groups]]", 1)


def good(job: Job) -> Row:
    """Accuracy is ten times the learning rate; a reference leaves its model."""
    if job.arguments["kind"] == "centralized":
        model = Path(job.arguments["folder"], job.arguments["model_file"])
        model.parent.mkdir(exist_ok=True)
        model.touch()
        return {"row": {"accuracy": [0.1, 0.9], "seconds": 1.0, "digest": job.id}}
    rate = job.arguments["config"].get("learning-rate", 0.02)
    metrics = {"round": [0, 1], "global-accuracy": [0, rate * 10]}
    return {"row": {"metrics": metrics, "digest": "d", "seconds": 1.0}}


def good_but(broken: str) -> Callable[[Job], Row]:
    """As `good`, but for one job."""
    return lambda job: {"error": "it broke"} if job.id == broken else good(job)


Run = Callable[..., tuple[Comparison, list[str], int]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a suite, where the result of a job is what ``answer`` makes of it.

    Gives the comparison, the ids of the jobs in their order, and how many failed.
    """

    def run(
        suite: str = SUITE, answer: Callable[[Job], Row] = good, groups: tuple[str, ...] = ()
    ) -> tuple[Comparison, list[str], int]:
        done = []

        def pretended(jobs: Iterable[Job], workers: int) -> Iterator[tuple[Job, Row]]:
            for job in jobs:
                done.append(job.id)
                job.folder.mkdir(parents=True)
                for name in ("config.json", "best_model.safetensors"):
                    (job.folder / name).write_text("{}")
                yield job, answer(job)

        monkeypatch.setattr(compare, "run_jobs", pretended)
        comparison = Comparison(parse_suite(suite, "mine"), Machine(tmp_path), 1, groups)
        return comparison, done, comparison.run()

    return run


def cells(folder: Path, name: str = "cells.jsonl") -> list[str]:
    return [row["cell"] for row in read_rows(folder / name)]


TUNE = [f"tune-mnist-5k-lenet-dirichlet-fedavg-c{n}-s100" for n in (0, 1)]
MAIN = [
    f"main-mnist-5k-lenet-iid-{name}-s{seed}" for name in ("fedavg", "fedbn") for seed in (0, 1)
]
OTHER = ["other-mnist-5k-lenet-iid-fedavg-s0"]
REFERENCE = ["mnist-5k-lenet-s0-b0"]


def test_everything_once_and_the_tuning_first(run: Run, tmp_path: Path) -> None:
    _, first, failed = run()
    assert failed == 0
    assert first == TUNE + REFERENCE + MAIN + OTHER
    assert cells(tmp_path) == MAIN + OTHER
    assert cells(tmp_path, "tune.jsonl") == TUNE
    assert cells(tmp_path, "centralized.jsonl") == REFERENCE
    assert (tmp_path / "suite.toml").read_text() == SUITE
    # The second candidate has the higher accuracy; `other` is not tuned, `fedbn` has no candidates.
    rates = {
        row["cell"]: row["config"].get("learning-rate")
        for row in read_rows(tmp_path / "cells.jsonl")
    }
    assert rates == {MAIN[0]: 0.2, MAIN[1]: 0.2, MAIN[2]: None, MAIN[3]: None, OTHER[0]: None}

    comparison, second, failed = run()
    assert (second, failed) == ([], 0)
    assert len(comparison.rows()) == 5
    assert list(comparison.tuning_table()["chosen"]) == [False, True]


def test_rows_say_where_they_stand_and_little_stays_of_runs(run: Run, tmp_path: Path) -> None:
    run()
    row = read_rows(tmp_path / "cells.jsonl")[0]
    factors = ("cell", "strategy", "dataset", "model", "partition", "seed", "group", "config")
    assert tuple(row)[:8] == factors
    # What belongs to this machine is in no row.
    assert {"output-dir", "data-root"}.isdisjoint(row["config"])
    # Only what the suite keeps.
    assert [path.name for path in (tmp_path / "runs" / MAIN[0]).iterdir()] == ["config.json"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(MAIN + OTHER)


def test_a_failed_cell_stops_no_other_and_is_tried_again(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, failed = run(answer=good_but(MAIN[1]))
    assert failed == 1
    assert f"{MAIN[1]} | FAILED: it broke" in capsys.readouterr().out
    assert cells(tmp_path) == [MAIN[0], *MAIN[2:], *OTHER]
    assert [(r["cell"], r["error"]) for r in read_rows(tmp_path / "failures.jsonl")] == [
        (MAIN[1], "it broke")
    ]
    _, again, failed = run()
    assert (again, failed) == ([MAIN[1]], 0)
    assert read_rows(tmp_path / "failures.jsonl") == []


def test_a_candidate_that_fails_cannot_win(run: Run, tmp_path: Path) -> None:
    _, _, failed = run(answer=good_but(TUNE[1]))
    assert failed == 1
    assert read_rows(tmp_path / "cells.jsonl")[0]["config"]["learning-rate"] == 0.1


def test_only_changed_cells_run_again(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run()
    _, again, _ = run(CHANGED)
    assert again == MAIN[2:]
    assert "2 rows of cells.jsonl are not of this suite any more" in capsys.readouterr().out
    assert cells(tmp_path, "outdated.jsonl") == MAIN[2:]
    assert sorted(cells(tmp_path)) == sorted(MAIN + OTHER)


def test_another_winner_changes_the_cells_that_it_is_in(run: Run, tmp_path: Path) -> None:
    run(answer=good_but(TUNE[1]))
    _, again, _ = run()
    assert again == [TUNE[1], *MAIN[:2]]


def test_one_group_at_a_time(run: Run, tmp_path: Path) -> None:
    # The reference is that of its data set and model, and its run is compared with it.
    _, first, _ = run(groups=("other",))
    assert first == TUNE + REFERENCE + OTHER
    _, rest, _ = run()
    assert rest == MAIN
    with pytest.raises(SuiteError, match="no group 'mian'; it has main, other"):
        run(groups=("mian",))


def test_a_row_that_was_cut_off_is_made_again(run: Run, tmp_path: Path) -> None:
    run()
    path = tmp_path / "cells.jsonl"
    text = path.read_text()
    path.write_text(text[:-20])
    _, again, _ = run()
    assert again == OTHER
    assert path.read_text() == text


def test_an_interruption_keeps_what_is_finished(run: Run, tmp_path: Path) -> None:
    def interrupted(job: Job) -> Row:
        if job.id == MAIN[2]:
            raise KeyboardInterrupt
        return good(job)

    with pytest.raises(KeyboardInterrupt):
        run(answer=interrupted)
    assert cells(tmp_path) == MAIN[:2]
    _, again, _ = run()
    assert again == MAIN[2:] + OTHER


def test_plan(run: Run, tmp_path: Path) -> None:
    suite = parse_suite(SUITE, "mine")
    plan = Comparison(suite, Machine(tmp_path), workers=2).plan().splitlines()
    assert plan[2] == "main: 4 cells, 4 to do, about 2 s each, 4 s in all"
    assert plan[-1].startswith("8 of 8 cells to do: about 6 s with 2 at a time")
    assert list(tmp_path.iterdir()) == []
    run(groups=("main",))
    # Those took half of what the suite says, and so will the others.
    plan = Comparison(suite, Machine(tmp_path), workers=1).plan().splitlines()
    assert plan[2] == "main: 4 cells, 0 to do, about 0 s each, 0 s in all"
    assert plan[3] == "other: 1 cells, 1 to do, about 2 s each, 2 s in all"


def jobs_of(run: Run, suite: str = SUITE) -> dict[str, Job]:
    """The jobs of a whole comparison, by id."""
    found: dict[str, Job] = {}

    def answer(job: Job) -> Row:
        found[job.id] = job
        return good(job)

    run(suite, answer)
    return found


def test_runs_are_compared_with_the_references_of_their_seed(run: Run, tmp_path: Path) -> None:
    both = f"{SUITE}batch-seeds = [1, 0]\n"
    jobs = jobs_of(run, both.replace('name = "other"', 'name = "ablation"'))

    def compared(id_: str) -> list[str]:
        found = jobs[id_].arguments["references"]
        assert all(Path(reference["model_file"]).exists() for reference in found)
        return [reference["digest"] for reference in found]

    references = [*REFERENCE, "mnist-5k-lenet-s0-b1"]
    # The second order of the batches after the first, with which it is compared.
    assert [id_ for id_ in jobs if id_ in references] == references
    assert [compared(id_) for id_ in references] == [[], references[:1]]
    # There is none of seed 1, so both count.
    assert [sorted(compared(id_)) for id_ in MAIN] == [references] * 4
    assert [compared(id_) for id_ in (*TUNE, "ablation-mnist-5k-lenet-iid-fedavg-s0")] == [[]] * 3
    # Pictures show the first seed.
    drawn = {id_: job.arguments.get("drawn") for id_, job in jobs.items()}
    assert drawn[MAIN[0]] == str(tmp_path / "inferred" / f"{MAIN[0]}.npz")
    assert {id_ for id_, file in drawn.items() if file} == {MAIN[0], MAIN[2]}


def test_a_reference_whose_model_is_not_here_is_trained_again_if_a_run_needs_it(
    run: Run, tmp_path: Path
) -> None:
    run(answer=good_but(MAIN[0]))
    (tmp_path / "models" / f"{REFERENCE[0]}.safetensors").unlink()
    _, again, _ = run()
    assert again == [*REFERENCE, MAIN[0]]
    # The same model, so one row; another machine's may differ in its last bits, and both stay.
    assert cells(tmp_path, "centralized.jsonl") == REFERENCE
    (row,) = read_rows(tmp_path / "centralized.jsonl")
    append_row(tmp_path / "centralized.jsonl", {**row, "digest": "of another machine"})
    _, again, _ = run()
    assert again == []
    assert cells(tmp_path, "centralized.jsonl") == REFERENCE * 2


def test_rows_may_lie_in_several_files(run: Run, tmp_path: Path) -> None:
    run()
    rows = read_rows(tmp_path / "cells.jsonl")
    (tmp_path / "cells.jsonl").unlink()
    for number, row in enumerate(rows):
        append_row(tmp_path / f"cells-{number}.jsonl", row)
    comparison, again, _ = run()
    assert again == []
    assert comparison.rows() == rows
    _, again, _ = run(CHANGED)
    assert again == cells(tmp_path) == cells(tmp_path, "outdated.jsonl") == MAIN[2:]


def test_data_root_goes_to_the_job_and_not_into_the_row(tmp_path: Path) -> None:
    comparison = Comparison(
        parse_suite(SUITE, "mine"), Machine(tmp_path, data_roots={"mnist-5k": "/digits"})
    )
    jobs = [work.job(comparison.machine) for work in comparison._compared()]
    assert {job.arguments["config"]["data-root"] for job in jobs} == {"/digits"}


def test_one_comparison_in_a_folder(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path):
            refused = pytest.raises(FedFusionError, match="another comparison")
            with refused, locked(tmp_path):
                pass


def test_rows_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    assert read_rows(path) == []
    rows = [{"a": 1, "b": [0.1, None]}, {"c": "\u2028 and \n"}]
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows
    with path.open("a") as file:
        file.write(json.dumps({"cut": 1})[:-2])
    assert read_rows(path) == rows
