"""What `make test` leaves to `make test-all` takes no promise from any family of models."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest
from chosen import family
from tiny import FAMILIES

HERE = Path(__file__).parent
PROMISES = HERE / "properties" / "test_promises.py"
EVERY = set(FAMILIES)
KEPT: dict[str, dict[str, set[str]]] = {
    "nothing means nothing": {
        "properties/test_promises.py::TestNothingMeansNothing": EVERY,
        "properties/test_addition.py::test_nowhere_and_strength_zero_are_nothing_to_the_bit": EVERY,
        "properties/test_sites.py::TestSteering::test_nothing_is_nothing_to_the_bit": EVERY,
        "properties/test_rejection.py::TestTheLoop::test_alpha_one_changes_nothing": EVERY - {"falcon"},
        "properties/test_rejection.py::TestTheLoop::test_beta_one_is_the_raw_model": EVERY - {"falcon"},
    },
    "neighbours don't matter": {
        "properties/test_promises.py::TestNeighboursDontMatter": EVERY,
        "properties/test_sites.py::TestSteering::test_every_row_is_what_the_naive_loop_gives": EVERY,
        "properties/test_rejection.py::TestAgainstTheNaiveReference": EVERY - {"falcon"},
        "properties/test_rejection.py::TestTheLoop::test_neighbours_and_order_do_not_matter": EVERY - {"falcon"},
        "engines/test_decode.py::TestRowsGetWhatTheyGetAlone::test_joining_at_random_steps": EVERY - {"mixtral"},
        "engines/test_prefill.py::test_answers_are_those_of_gates_read_beforehand": EVERY,
        "engines/test_continuous.py::test_answers_that_end_at_different_lengths": EVERY - {"mixtral"},
        "engines/test_next_token.py::test_rows_are_what_each_text_gives_alone": EVERY,
    },
    "the cache is exact": {
        "properties/test_promises.py::TestTheCacheIsExact": EVERY,
        "properties/test_capture.py::test_a_shared_beginning_changes_nothing": EVERY,
        "properties/test_rejection.py::TestTheLoop::test_the_cache_is_the_raw_one": EVERY - {"falcon"},
        "benchmarks/test_opening.py::test_an_opening_changes_nothing": EVERY,
    },
    "an edit does what its name says": {
        "properties/test_promises.py::TestAnEditDoesWhatItsNameSays": EVERY,
        "properties/test_addition.py": EVERY,
        "properties/test_sites.py::TestSteering::test_activations_differ_by_the_operation": EVERY,
        "properties/test_sites.py::TestReading": EVERY,
        "properties/test_capture.py": EVERY,
        "properties/test_rejection.py::TestRows": EVERY - {"falcon"},
    },
    "nothing is guessed": {"properties/test_promises.py::TestNothingIsGuessed": EVERY},
    "nothing runs from a file": {
        "files/test_hostile_files.py::test_a_payload_never_runs": set(),
        "files/test_hostile_files.py::test_damage": set(),
        "files/test_steering_file.py::test_a_pickle_is_never_opened": set(),
    },
    "the same seed gives the same bytes": {
        "properties/test_repeatable.py": EVERY,
        "files/test_steering_file.py::test_the_same_bytes_in_every_process": set(),
    },
    "nothing is silently unsteered": {
        "properties/test_nothing_unsteered.py::TestPlantedFaults::test_a_step_that_is_swallowed_in_every_family": EVERY,
        "engines/test_compat.py::TestCaches::test_every_family_declares_its_parameter": EVERY,
        "properties/test_promises.py::TestAnEditDoesWhatItsNameSays::test_the_dose_is_the_ratio_of_norms": EVERY,
        "properties/test_sites.py::TestSteering::test_the_dose_is_the_ratio_of_norms": EVERY,
    },
}
"""By promise, where it is tested, and on which families: rejection is steered attention, which Falcon's can't be."""


class Collected:
    """The families of each test function, of the cases that a run would take."""

    def __init__(self) -> None:
        self.families: dict[str, set[str]] = defaultdict(set)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            name = f"{item.path.relative_to(HERE).as_posix()}::{item.nodeid.split('[')[0].partition('::')[2]}"
            self.families[name] |= {family(item)} - {None}


@pytest.fixture(scope="module")
def families() -> dict[str, set[str]]:
    """What is collected for `make test`, by this very process: what is imported already isn't imported again."""
    collected = Collected()
    files = {HERE / name.split("::")[0] for where in KEPT.values() for name in where}
    options = ["--collect-only", "-qq", "-m", "not long", "-p", "no:cacheprovider", "-p", "no:xdist"]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_ADDOPTS", raising=False)
        patch.chdir(HERE.parent)
        environment = dict(os.environ)
        code = pytest.main([*options, *map(str, sorted(files))], plugins=[collected])
        assert dict(os.environ) == environment
    assert code == 0
    return collected.families


@pytest.mark.parametrize("promise", KEPT)
def test_every_promise_is_tested_on_every_family(promise: str, families: dict[str, set[str]]) -> None:
    for where, expected in KEPT[promise].items():
        tests = [name for name in families if name.startswith(where)]
        assert tests, f"{where} isn't there, or is long"
        missing = {name: expected - families[name] for name in tests}
        assert not any(missing.values()), {name: families for name, families in missing.items() if families}


def test_all_promises_have_their_place() -> None:
    """A test that is added to the promises' own file is under one of them."""
    classes = [line.split()[1].rstrip(":") for line in PROMISES.read_text().splitlines() if line.startswith("class ")]
    places = {where for of in KEPT.values() for where in of}
    assert {f"properties/test_promises.py::{name}" for name in classes} <= places
