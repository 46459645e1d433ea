"""`trimtab generate --dose`: the strength is found on the prompts, and said."""

import pytest

from trimtab import LM, load
from trimtab.tune import at_dose, at_nats


@pytest.fixture
def ask(trimtab, model):
    given = ("--model", model, "--device", "cpu", "--prompt", "Why?", "--prompt", "Who are you?", "--max-new-tokens", 4)
    return lambda *rest: trimtab("generate", *given, *rest)


def test_the_dose_is_that_of_python_and_its_strength_is_told(ask, model, steering):
    told = ask("--steer", f"{steering}:-2", "--dose", 0.2, "--json")
    assert (told.code, told.err) == (0, "")
    found = at_dose(LM.load(model, device="cpu"), -2.0 * load(steering), 0.2, ["Why?", "Who are you?"])
    assert told.json["dosed"] == {"dose": pytest.approx(found.dose), "factor": pytest.approx(found.factor)}
    assert told.json["dosed"]["dose"] == pytest.approx(0.2, rel=0.02)
    assert told.json["answers"][0]["edits"] == [str(edit) for edit in found.steering.edits]
    for row in told.json["answers"]:
        assert row["dose"] < row["overall_dose"] == pytest.approx(0.2, rel=0.5)

    shown = ask("--steer", f"{steering}:-2", "--dose", 0.2)
    strength = f"{steering}:{-2 * found.factor:.3g}"
    assert f"dose 0.2 is strength × {found.factor:.3g}: --steer {strength}" in " ".join(shown.err.split())
    again = ask("--steer", strength, "--json")
    assert "dosed" not in again.json
    assert again.json["answers"][0]["overall_dose"] == pytest.approx(told.json["answers"][0]["overall_dose"], rel=0.05)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--dose 0.2", "--dose says how hard to steer; give --steer FILE as well"),
        ("--steer FILE --dose 0", "--dose is a number above 0, such as 0.2, got 0"),
        ("--steer FILE --dose nan", "--dose is a number above 0"),
        ("--steer FILE --dose 0.2 --engine vllm", "the vllm engine doesn't measure them"),
        ("--steer FILE:0 --dose 0.2", "nothing is steered on these prompts"),
    ],
)
def test_bad_doses(ask, steering, given, said):
    told = ask(*given.replace("FILE", str(steering)).split())
    assert told.code == 2
    assert said in told.err
    assert told.err.count("\n") == 1


def test_nats_are_those_of_python_and_their_strength_is_told(ask, model, steering):
    told = ask("--steer", f"{steering}:-2", "--nats", 0.3, "--json")
    lm = LM.load(model, device="cpu")
    found = at_nats(lm, -2.0 * load(steering), 0.3, ["Why?", "Who are you?"])
    assert told.json["divergence"] == {
        "p95": pytest.approx(found.divergence.p95),
        "mean": pytest.approx(found.divergence.mean),
        "tokens": found.divergence.tokens,
        "factor": pytest.approx(found.factor),
        "monotone": found.monotone,
    }
    assert told.json["divergence"]["p95"] == pytest.approx(0.3, rel=0.02)
    assert lm.divergence(found.steering, ["Why?", "Who are you?"]) == found.divergence
    shown = ask("--steer", f"{steering}:-2", "--nats", 0.3)
    assert f"are strength × {found.factor:.3g}: --steer {steering}:" in " ".join(shown.err.split())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--nats 1", "--nats says how hard to steer; give --steer FILE as well"),
        ("--steer FILE --nats 0", "--nats is a number above 0, such as 1, got 0"),
        ("--steer FILE --nats 1 --dose 0.2", "both say how hard to steer"),
        ("--steer FILE --nats 1 --engine vllm", "which the vllm engine doesn't give"),
    ],
)
def test_bad_nats(ask, steering, given, said):
    told = ask(*given.replace("FILE", str(steering)).split())
    assert told.code == 2
    assert said in " ".join(told.err.split())
