"""A steering that acts on some prompts only: a cheerful voice where the question is about cooking.

A condition (CAST, Lee et al., 2025) is learned from twenty questions on which to act and twenty others. Where it
doesn't hold, the answer is the unsteered model's, bit for bit.

    python examples/gate.py
"""

from pathlib import Path

from trimtab import LM, learn_caa, read_pairs
from trimtab.methods.cast import learn_condition

DATA = Path(__file__).parent / "data"
QUESTIONS = [
    "How do I make an omelette?",
    "What goes well with rice?",
    "How do I learn to swim?",
    "What is a black hole?",
]

lm = LM.load()
cooking = (DATA / "cooking.txt").read_text().splitlines()
other = (DATA / "other.txt").read_text().splitlines()
condition = learn_condition(lm, cooking, other)
print(f"the condition reads layer {condition.measured['layer']}, area under its curve {condition.measured['area']:.2f}")

cheerful = learn_caa(lm, read_pairs(DATA / "cheerful.jsonl"), layers=12, read_at="answer")
steering = (2 * cheerful).when(condition.gate)
unsteered = lm.generate(QUESTIONS, max_new_tokens=32)
steered = lm.generate(QUESTIONS, steering, max_new_tokens=32)
for question, plain, answer in zip(QUESTIONS, unsteered, steered, strict=True):
    acted = f"dose {answer.applied.dose:.2f}" if answer.applied.dose else "the gate stays shut"
    print(f"\n{question} ({acted})\n  unsteered: {plain.text}\n  steered:   {answer.text}")
    assert answer.applied.dose or answer.text == plain.text
