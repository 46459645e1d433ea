"""Runs the benchmark: each task's arms without a steering, then each method at each divergence, one file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.bench.doses import Dose, Doses, Steerings, base_of, scaled
from trimtab.bench.emphasizing import EMPHASIS, emphasis_steerings, random_span_steerings
from trimtab.bench.learning import CONTROL, Inputs, inputs_for, learn_steering, orthogonal
from trimtab.bench.plan import Plan
from trimtab.bench.results import Results, results_of
from trimtab.bench.side_effects import side_effects
from trimtab.bench.store import Store
from trimtab.bench.tasks import PLAIN, ArmResult, Task
from trimtab.engines.contract import FEATURES
from trimtab.engines.language_model import LanguageModel
from trimtab.errors import TrimtabError
from trimtab.evaluate.decision import LEVEL, decide
from trimtab.evaluate.divergence import Reference
from trimtab.files.steering_file import steering_digest
from trimtab.learn.inputs import check_lm
from trimtab.steering import Steering
from trimtab.tune.forecast import SUPPORTED_METHODS, predictors

if TYPE_CHECKING:
    from trimtab.lm import LM
    from trimtab.methods.recipe import Recipe

LORA = "LoRA"
Progress = Callable[[int, int], None]


def bench(
    lm: LM,
    plan: Plan,
    folder: str | Path,
    *,
    answering: LanguageModel | None = None,
    mix_code: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Results:
    """Run a plan, and summarize the results.

    Each cell (a method on a task) is a file in the folder, written atomically. An interrupted run is resumed by the
    same call, and ends with the same bytes as one that wasn't interrupted. The same model, settings, machine and number
    of threads give the same files.

    Args:
        lm: The model, on the transformers engine.
        plan: The result of `plan`.
        folder: The folder of the run; it may hold an unfinished run with the same settings.
        answering: The same model on another engine, such as replicas of vLLM. It generates answers and scores letters,
            for all arms; methods that it doesn't support are left out, with the reason. Learning, divergences and side
            effects stay with `lm`.
        mix_code: Resume a run that other code of trimtab began; `results.json` then lists the digests of both.
        progress: Called with the number of cells that are done, and their total.
        say: Called with the name of the task that starts.

    Raises:
        TrimtabError: A folder with another run, or one that other code began; a model that is being steered or on
            another engine, or two models that aren't the same.
    """
    check_lm(lm, "logits", "training")
    if answering is not None:
        _check_same(lm, answering)
    head = plan.head(lm) | ({} if answering is None else {"answers": _engine_of(answering)})
    store = Store(Path(folder), head, mix_code=mix_code)
    done, total = 0, plan.cells
    for outline in plan.outlines:
        if say is not None:
            say(outline.name)
        running: _TaskRun | None = None
        with lm._caching_prefixes():  # all methods use the same prompts
            try:
                running = _TaskRun(lm, store, plan, outline.make(lm, store, plan.settings.items), answering)
                running.run_arms()
            except TrimtabError as error:
                store.get_or_create("cells", outline.name, "task", make=partial(dict, left_out=str(error)))
                running = None
            for name in plan.rows:
                if running is not None:
                    running.run_method(name)
                done += 1
                if progress is not None:
                    progress(done, total)
    return results_of(store.folder)


class _TaskRun:
    """One task while it runs; holds everything that is measured once for all of its methods."""

    def __init__(self, lm: LM, store: Store, plan: Plan, task: Task, answering: LanguageModel | None = None) -> None:
        self.lm, self.store, self.plan, self.task = lm, store, plan, task
        self.answering: Any = lm if answering is None or task.logits else answering
        self._base: Reference | None = None
        self._plain: ArmResult | None = None
        self._side_effects = side_effects(plan.settings.data, plan.sides)

    @property
    def base(self) -> Reference:
        """The reference for divergences."""
        if self._base is None:
            self._base = base_of(self.lm, self.task)
        return self._base

    def run_arms(self) -> None:
        """Run the arms without a steering, and store the task's description."""
        task = self.task
        for arm in (PLAIN, *task.prompted):
            stored = self.store.get_or_create("cells", task.name, arm, make=partial(self._measure_arm, arm))
            if arm == PLAIN:
                self._plain = _measured(stored)
        self.store.get_or_create(
            "cells",
            task.name,
            "task",
            make=lambda: {
                "about": task.about,
                "unit": task.unit,
                "items": task.items,
                "groups": task.groups,
                "pairs": {shape: len(pairs) for shape, pairs in task.training_data.pairs.items()},
            },
        )

    def _measure_arm(self, arm: str) -> dict[str, Any]:
        return asdict(self._measure(arm, [None])[0])

    def run_method(self, name: str) -> None:
        """Run one method: its doses, its runs, its controls; or store why there are none."""
        make = self._lora if name == LORA else self._emphasis if name in EMPHASIS else self._method
        self.store.get_or_create("cells", self.task.name, "method", name, make=lambda: make(name))

    # ---- kinds of rows -----------------------------------------------------------------------------------

    def _method(self, name: str) -> dict[str, Any]:
        recipe = self.plan.recipes[name]
        inputs = inputs_for(recipe, self.task.training_data, self.plan.settings.seed)
        if isinstance(inputs, str):
            return {"left_out": inputs}
        try:
            steering = self.store.get_or_create_steering(
                self.task.name, name, make=lambda: learn_steering(self.lm, recipe, inputs)
            )
            self.lm.check(steering)
        except (TrimtabError, ValueError, ArithmeticError) as error:
            return {"left_out": f"it couldn't be learned: {error}"}
        except Exception as error:
            if recipe.distribution == "trimtab":
                raise
            return {"left_out": f"it couldn't be learned: {type(error).__name__}: {error} ({recipe.distribution})"}
        try:
            self._check_fits([steering])
        except TrimtabError as error:
            return {"left_out": str(error)}
        result = self._run_at_doses(steering, None, {})
        result["edits"] = len(steering.edits)
        result["digest"] = steering_digest(steering)
        if name in SUPPORTED_METHODS:
            result["predictors"] = self._predictors(recipe, inputs, steering)
        if name != CONTROL:
            self._add_controls(steering, result)
        return result

    def _emphasis(self, name: str) -> dict[str, Any]:
        task, method = self.task, EMPHASIS[name]
        if not task.phrases:
            return {"left_out": "it emphasizes a phrase of the prompt, and here the prompts have no instruction"}
        try:
            learned = None
            if method.learn is not None:
                learned = self.store.get_or_create_steering("every task", name, make=partial(method.learn, self.lm))
            each = emphasis_steerings(self.lm, method, task.prompts, task.phrases, learned)
            emphases = emphasis_steerings(self.lm, method, task.reference_prompts, task.reference_phrases, learned)
            self._check_fits(each, *(name for name in method.options if name in FEATURES))
        except TrimtabError as error:
            return {"left_out": str(error)}
        if method.fixed:
            run = asdict(self._measure(PLAIN, [each], method.options)[0])
            result: dict[str, Any] = {"note": method.fixed, "runs": [{"nats": None, "factor": 1.0, **run}]}
        else:
            result = self._run_at_doses(emphases, each, method.options)
        self._add_random_spans(each, emphases, method.options, result)
        return result

    def _lora(self, _name: str) -> dict[str, Any]:
        from trimtab.evaluate.lora import finetuned

        if self.answering is not self.lm:
            return {
                "left_out": f"its weights are changed here, and answers come from the {self.answering.engine} engine"
            }
        pairs = self.task.training_data.pairs
        shape = next((shape for shape in ("letters", "answers", "texts") if pairs.get(shape)), None)
        if shape is None:
            return {"left_out": "a LoRA is finetuned on answers, and this task has none"}
        self._side_effect_baselines()  # before the weights change
        try:
            with finetuned(self.lm, pairs[shape], "positive") as tuned:
                run = asdict(self.task.measure(tuned, PLAIN, [[None] * len(self.task.items)], {})[0])
                if self.plan.settings.thorough or self._gains(run["scores"]):
                    run["sides"] = self._measure_side_effects(tuned, None)
        except TrimtabError as error:
            return {"left_out": str(error)}
        note = "its weights are changed, so its strength isn't set by nats"
        return {"note": note, "runs": [{"nats": None, "factor": 1.0, **run}]}

    # ---- parts -------------------------------------------------------------------------------------------

    def _check_fits(self, steerings: Sequence[Steering], *features: str) -> None:
        """Raises `TrimtabError` if another engine answers and doesn't support these steerings."""
        if self.answering is not self.lm:
            self.answering.require(*features)
            for steering in steerings:
                self.answering.check(steering)

    def _measure(self, arm: str, runs: Sequence[Any], options: Mapping[str, Any] | None = None) -> list[ArmResult]:
        count = len(self.task.items)
        each = [[None] * count if run is None else run for run in runs]
        return self.task.measure(self.answering, arm, each, options or {})

    def _run_at_doses(
        self, steered: Steerings, each: Sequence[Steering] | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The method at each divergence that it reaches, and the reasons why it doesn't reach the others.

        Divergences are measured with `steered`; `each` is a steering for each item (`None`: the same for all).
        """
        doses = Doses(self.lm, self.base, steered)
        reached: list[Dose] = []
        lacking = []
        for nats in self.plan.nats:
            try:
                reached.append(doses.at(nats))
            except TrimtabError as error:
                lacking.append({"nats": nats, "reason": str(error)})
        runs = []
        if reached:
            wanted = [self._steerings_per_item(steered if each is None else each, dose.factor) for dose in reached]
            measured = self._measure(PLAIN, wanted, options)
            runs = [{**asdict(dose), **asdict(measures)} for dose, measures in zip(reached, measured, strict=True)]
        return {"runs": runs, "lacking": lacking, "monotone": doses.monotone}

    def _add_controls(self, steering: Steering, result: dict[str, Any]) -> None:
        """Measure orthogonal directions and side effects, for runs with a gain that they could explain or spoil."""
        wanted = self._worth_controls(result)
        if not wanted:
            return
        try:
            control = orthogonal(self.lm, steering, self.task, self.plan.settings.seed)
        except TrimtabError as error:
            result["no_orthogonal"] = str(error)
        else:
            doses = Doses(self.lm, self.base, control)
            for run in wanted:
                try:
                    dose = doses.at(run["nats"])
                except TrimtabError as error:
                    run["orthogonal"] = {"left_out": str(error)}
                    continue
                each = self._steerings_per_item(control, dose.factor)
                run["orthogonal"] = {**asdict(dose), **asdict(self._measure(PLAIN, [each])[0])}
        for run in wanted:
            run["sides"] = self._measure_side_effects(self.lm, run["factor"] * steering)

    def _add_random_spans(
        self,
        each: Sequence[Steering],
        emphases: Sequence[Steering],
        options: Mapping[str, Any],
        result: dict[str, Any],
    ) -> None:
        """Measure the same emphasis at a random span of each prompt, for runs with a gain that it could explain.

        Side effects on other prompts aren't measured, since an emphasis acts on its own prompt only.
        """
        wanted = self._worth_controls(result)
        if not wanted:
            return
        task = self.task
        try:
            control = random_span_steerings(self.lm, each, task.prompts, task.phrases)
            references = random_span_steerings(self.lm, emphases, task.reference_prompts, task.reference_phrases)
        except TrimtabError as error:
            result["no_span"] = str(error)
            return
        doses = Doses(self.lm, self.base, references)
        for run in wanted:
            dose: dict[str, Any] = {"factor": run["factor"]}
            if run["nats"] is not None:
                try:
                    dose = asdict(doses.at(run["nats"]))
                except TrimtabError as error:
                    run["span"] = {"left_out": str(error)}
                    continue
            steerings = self._steerings_per_item(control, dose["factor"])
            run["span"] = {**dose, **asdict(self._measure(PLAIN, [steerings], options)[0])}

    def _worth_controls(self, result: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The runs that controls and side effects are measured for."""
        return [run for run in result["runs"] if self.plan.settings.thorough or self._gains(run["scores"])]

    def _measure_side_effects(self, lm: LM, steering: Steering | None) -> dict[str, list[float]]:
        """Each side effect's values under a steering, or in a model with other weights; none of the task itself."""
        baselines = self._side_effect_baselines()
        return {name: side.measure(lm, steering) for name, side in self._side_effects.items() if baselines.get(name)}

    def _steerings_per_item(self, steering: Steerings, factor: float) -> Sequence[Steering]:
        """A steering for each item; if it is one for all, the same object."""
        dosed = scaled(steering, factor)
        return [dosed] * len(self.task.items) if isinstance(dosed, Steering) else dosed

    def _gains(self, scores: Sequence[float]) -> bool:
        assert self._plain is not None
        return decide(self._plain.scores, scores, groups=self.task.groups).p <= LEVEL

    def _side_effect_baselines(self) -> dict[str, list[float]]:
        """The side effects' values without a steering, measured once for all tasks."""
        return {
            name: self.store.get_or_create("cells", "sides", name, make=partial(side.measure, self.lm, None))
            for name, side in self._side_effects.items()
            if name != self.task.name
        }

    def _predictors(self, recipe: Recipe, inputs: Inputs, steering: Steering) -> dict[str, Any] | None:
        assert recipe.takes == "pairs"
        try:
            return asdict(predictors(self.lm, inputs.data[0], steering, self.task.reference_prompts, base=self.base))
        except TrimtabError:
            return None


def _engine_of(lm: LanguageModel) -> dict[str, str]:
    return {"engine": lm.engine, **lm.runs_in}


def _check_same(lm: LM, answering: LanguageModel) -> None:
    """Raises `TrimtabError` if `answering` isn't the model that methods are learned on, in the same precision."""
    answering.require("perplexity")
    for what, here, there in (
        ("weights", lm.identity.fingerprint, answering.identity.fingerprint),
        ("dtype", lm.runs_in["dtype"], answering.runs_in["dtype"]),
    ):
        if here != there:
            raise TrimtabError(
                f"the model that answers isn't the one that methods are learned on: {what} {there}, not {here};"
                " load both from the same files, with the same dtype"
            )


def _measured(stored: Mapping[str, Any]) -> ArmResult:
    beside = {name: tuple(values) for name, values in stored["beside"].items()}
    return ArmResult(tuple(stored["scores"]), beside, tuple(stored["answers"]))
