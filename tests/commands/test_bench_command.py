"""`trimtab bench` and `trimtab forecast` as somebody types them, on a tiny model; and the forecast of `learn`."""

from __future__ import annotations

import json

import pytest

from trimtab.bench.store import Store
from trimtab.commands.bench import seconds_of
from trimtab.errors import TrimtabError
from trimtab.tune.forecast import Predictors, forecast


@pytest.fixture
def cpu(trimtab, model, monkeypatch):
    """The command with `model`, and no data but the package's."""
    monkeypatch.delenv("TRIMTAB_DATA", raising=False)

    def run(line, *more):
        named = () if line.startswith("forecast") else ("--model", model, "--device", "cpu", "--dtype", "float32")
        return trimtab(*line.split(), *more, *named)

    return run


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("25min", 1500), ("90s", 90), ("10", 600), ("1.5 h", 5400)]
)
def test_budgets(text, seconds):
    assert seconds_of(text) == seconds
    with pytest.raises(TrimtabError, match="isn't a time"):
        seconds_of(f"{text} or so")


def test_a_dry_run_tells_the_plan_and_the_time(cpu, tmp_path):
    ran = cpu("bench --tasks !refusal --methods re*,caa --dry-run --json", "--out", tmp_path / "b")
    assert ran.code == 0
    assert ran.json["methods"] == ["random", "caa", "repe", "reps"]
    assert ran.json["cells"] == 4 * len(ran.json["tasks"])
    assert ran.json["seconds"] > 0
    assert "--data FOLDER" in ran.json["left_out"]["behaviours"]
    assert "refusal" not in ran.json["left_out"]  # nobody asked for it
    assert not (tmp_path / "b").exists()


def test_a_run_a_page_and_the_same_again(cpu, tmp_path):
    command = "bench --tasks no_comma --methods caa,instruct --nats 1 --items 4 --pairs 8 --tokens 4"
    ran = cpu(command, "--out", tmp_path / "b")
    assert ran.code == 0
    assert "no_comma" in ran.out
    assert "called better" in ran.out
    page, results = (tmp_path / "b" / "page.html").read_bytes(), (tmp_path / "b" / "results.json").read_bytes()
    again = cpu(f"{command} --json", "--out", tmp_path / "b")
    assert again.code == 0
    assert again.json == json.loads(results)
    assert "3 cells, all of them already done" in cpu(command, "--out", tmp_path / "b").err
    assert (tmp_path / "b" / "page.html").read_bytes() == page
    assert (tmp_path / "b" / "results.json").read_bytes() == results
    other = cpu("bench --tasks no_comma --methods caa --nats 1 --items 5", "--out", tmp_path / "b")
    assert other.code == 2
    assert "other settings (" in other.err
    assert "items: 4 there and 5 now" in other.err
    foretold = cpu("forecast", tmp_path / "b")
    assert foretold.code == 2
    assert "needs both outcomes" in foretold.err


def test_bad_input_is_named(cpu, trimtab, tmp_path):
    for options, said in (
        ("--methods cab", "there is no method 'cab'"),
        ("--nats one", "isn't a list of numbers"),
        ("--budget soon", "isn't a time"),
        ("--tasks refusal", "its data aren't there"),
    ):
        ran = cpu(f"bench {options}", "--out", tmp_path / "b")
        assert ran.code == 2
        assert said in ran.err
    assert cpu("forecast", tmp_path).code == 2
    (tmp_path / "file").write_text("mine")
    ran = trimtab("bench", "--out", tmp_path / "file", "--model", tmp_path / "no-model")
    assert (ran.code, "is a file; give a folder" in ran.err) == (2, True)


def test_learn_says_whether_it_is_likely_to_steer(cpu, tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Is {n} blue?", "positive": "yes", "negative": "no"} for n in range(9)]
    file.write_text("\n".join(map(json.dumps, rows)))
    said = cpu("learn caa --forecast", "--pairs", file, "--out", tmp_path / "a.safetensors")
    assert "forecast: " not in said.out
    assert "no forecast, since the fit can't be trusted" in said.out.replace("\n", " ")
    assert "of held-out pairs point along the direction" in said.out
    ran = cpu("learn caa --json --forecast", "--pairs", file, "--out", tmp_path / "b.safetensors")
    assert ran.json["forecast"]["verdict"] in ("works", "unlikely", "can't say")
    assert ran.json["forecast"]["predictors"]["agree"] >= 0
    quiet = cpu("learn caa --json", "--pairs", file, "--out", tmp_path / "c.safetensors")
    assert "forecast" not in quiet.json
    assert "forecast" not in cpu("learn caa", "--pairs", file, "--out", tmp_path / "d.safetensors").out
    few = cpu("learn caa --forecast", "--pairs", _first(file, 4, tmp_path), "--out", tmp_path / "e.safetensors")
    assert "forecast: can't say (4 pairs are too few for a forecast" in few.out


def made_up_run(folder, tasks=6):
    """A finished run in which the instruction vector works where its pairs agree, and CAA never does."""
    items = [f"item {n}" for n in range(8)]
    names = [f"task {n}" for n in range(tasks)]
    head = {
        "model": {"name": "tiny", "fingerprint": "f", "dtype": "torch.float32"},
        "settings": {"items": 8, "pairs": 8, "tokens": 4, "nats": [1.0], "seed": 0},
        "tasks": names,
        "rows": ["random", "caa", "instruct"],
        "titles": {},
        "left_out": {},
        "versions": {"trimtab": "1.0"},
    }
    store = Store(folder, head)

    def put(*key, value):
        store.get_or_create("cells", *key, make=lambda: value)

    for number, name in enumerate(names):
        put(name, "task", value={"about": "", "unit": "share", "groups": items})
        put(name, "unsteered", value={"scores": [0.0] * 8, "beside": {}, "answers": []})
        for method in head["rows"]:
            works = method == "instruct"
            scores = [float(works)] * 8
            features = {
                "agree": 0.6 + 0.3 * works + number / 100,
                "separation": 1.0,
                "auc": 0.5,
                "reach": 0.0,
                "bend": 2.0,
            }
            stored = {"runs": [{"nats": 1.0, "factor": 1.0, "scores": scores, "beside": {}}]}
            put(name, "method", method, value=stored | ({} if method == "random" else {"predictors": features}))


def test_a_forecast_is_fitted_checked_and_written(trimtab, tmp_path):
    made_up_run(tmp_path / "run")
    ran = trimtab("forecast", tmp_path / "run", "--write", tmp_path / "fit.json")
    assert ran.code == 0, ran.err
    assert "12 results, 6 of which worked; AUC on tasks left out one at a time: 1.00" in ran.out
    weights = {line.split()[0]: line.split() for line in ran.out.splitlines() if line.strip()}
    assert float(weights["agree"][1]) > 0
    assert weights["agree"][2] == "1.00"
    assert weights["bend"][2] == "0.50"
    assert "saved " in ran.out
    document = json.loads((tmp_path / "fit.json").read_text())
    assert (document["results"], document["worked"], document["auc"]) == (12, 6, 1.0)
    (source,) = document["made_from"]
    assert (source["model"], source["tasks"], source["results"], source["items"]) == ("tiny", 6, 12, 8)
    chances = [forecast(Predictors(agree, 1.0, 0.5, 0.0, 2.0), document) for agree in (0.6, 0.9)]
    assert chances[0].chance < 0.3 < 0.7 < chances[1].chance
    assert all(each.trusted for each in chances)
    assert trimtab("forecast", tmp_path / "run", "--json").json == document
    wrong = trimtab("forecast", tmp_path / "run", "--write", tmp_path / "fit.txt")
    assert wrong.code == 2
    assert ".json" in wrong.err


def _first(file, count, folder):
    path = folder / "few.jsonl"
    path.write_text("\n".join(file.read_text().splitlines()[:count]))
    return path
