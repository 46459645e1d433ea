"""`trimtab generate --dose`: the strength is found on the prompts, and said."""

import pytest
import torch

from trimtab import LM, Add, Card, Edit, Site, Steering, load, save
from trimtab.tune import at_dose, at_nats


@pytest.fixture
def ask(trimtab, model):
    options = (
        "--model",
        model,
        "--device",
        "cpu",
        "--prompt",
        "Why?",
        "--prompt",
        "Who are you?",
        "--max-new-tokens",
        4,
    )
    return lambda *rest: trimtab("generate", *options, *rest)


def test_the_dose_is_that_of_python_and_its_strength_is_told(ask, model, steering):
    ran = ask("--steer", f"{steering}:-2", "--dose", 0.2, "--json")
    assert (ran.code, ran.err) == (0, "")
    dosed = at_dose(LM.load(model, device="cpu"), -2.0 * load(steering), 0.2, ["Why?", "Who are you?"])
    assert ran.json["dosed"] == {"dose": pytest.approx(dosed.dose), "factor": pytest.approx(dosed.factor)}
    assert ran.json["dosed"]["dose"] == pytest.approx(0.2, rel=0.02)
    assert ran.json["answers"][0]["edits"] == [str(edit) for edit in dosed.steering.edits]
    for row in ran.json["answers"]:
        assert row["dose"] < row["overall_dose"] == pytest.approx(0.2, rel=0.5)

    shown = ask("--steer", f"{steering}:-2", "--dose", 0.2)
    strength = f"{steering}:{-2 * dosed.factor:.3g}"
    assert f"dose 0.2 is strength × {dosed.factor:.3g}: --steer {strength}" in " ".join(shown.err.split())
    again = ask("--steer", strength, "--json")
    assert "dosed" not in again.json
    assert again.json["answers"][0]["overall_dose"] == pytest.approx(ran.json["answers"][0]["overall_dose"], rel=0.05)


def test_a_suggested_strength_is_printed_for_a_file_without_one(ask, tmp_path):
    card = Card("caa", measured={"activation_norm": {"1": 10.0, "2": 10.0}})
    path = tmp_path / "my add.safetensors"
    save(Steering(tuple(Edit(Site(layer), Add(torch.eye(32)[0])) for layer in (1, 2)), card), path)
    hint = "acts at strength 1; its card suggests --steer"
    ran = ask("--steer", path, "--steer", f"{path}@2:-1")
    assert ran.code == 0, ran.err
    assert f"{path} {hint} '{path}:1.4'" in " ".join(ran.err.split())  # 0.2 over two layers at 0.1
    assert ran.err.count("its card suggests") == 1
    assert "suggests" not in ran.out
    assert f"{path}@2 {hint} '{path}@2:2'" in " ".join(ask("--steer", f"{path}@2").err.split())
    for rest in ((f"{path}:1",), (path, "--dose", 0.2), (path, "--json")):
        ran = ask("--steer", *rest)
        assert ran.code == 0, ran.err
        assert "its card suggests" not in ran.err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--dose 0.2", "--dose says how hard to steer; give --steer FILE as well"),
        ("--steer FILE --dose 0", "--dose is a number above 0, such as 0.2, got 0"),
        ("--steer FILE --dose nan", "--dose is a number above 0"),
        ("--steer FILE --dose 0.2 --engine vllm", "the vllm engine doesn't measure them"),
        ("--steer FILE:0 --dose 0.2", "nothing is steered on these prompts"),
    ],
)
def test_bad_doses(ask, steering, options, said):
    ran = ask(*options.replace("FILE", str(steering)).split())
    assert ran.code == 2
    assert said in ran.err
    assert ran.err.count("\n") == 1


def test_nats_are_those_of_python_and_their_strength_is_told(ask, model, steering):
    ran = ask("--steer", f"{steering}:-2", "--nats", 0.3, "--json")
    lm = LM.load(model, device="cpu")
    dosed = at_nats(lm, -2.0 * load(steering), 0.3, ["Why?", "Who are you?"])
    assert ran.json["divergence"] == {
        "p95": pytest.approx(dosed.divergence.p95),
        "mean": pytest.approx(dosed.divergence.mean),
        "tokens": dosed.divergence.tokens,
        "factor": pytest.approx(dosed.factor),
        "monotone": dosed.monotone,
    }
    assert ran.json["divergence"]["p95"] == pytest.approx(0.3, rel=0.02)
    assert lm.divergence(dosed.steering, ["Why?", "Who are you?"]) == dosed.divergence
    shown = ask("--steer", f"{steering}:-2", "--nats", 0.3)
    assert f"are strength × {dosed.factor:.3g}: --steer {steering}:" in " ".join(shown.err.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--nats 1", "--nats says how hard to steer; give --steer FILE as well"),
        ("--steer FILE --nats 0", "--nats is a number above 0, such as 1, got 0"),
        ("--steer FILE --nats 1 --dose 0.2", "both say how hard to steer"),
        ("--steer FILE --nats 1 --engine vllm", "which the vllm engine doesn't return"),
    ],
)
def test_bad_nats(ask, steering, options, said):
    ran = ask(*options.replace("FILE", str(steering)).split())
    assert ran.code == 2
    assert said in " ".join(ran.err.split())
