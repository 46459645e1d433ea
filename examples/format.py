"""A format from an instruction: learn the difference that "use bullet points" makes, and use it without saying it.

The instruction vector (Stolfo et al., 2025) strengthens an instruction that is in the prompt. Where the prompt says
nothing of it, `trimtab learn distill` holds it far better; it takes some minutes.

    python examples/format.py
"""

from pathlib import Path

from trimtab import LM, Pair, learn_instruct

DATA = Path(__file__).parent / "data"
INSTRUCTION = "Answer with a list of bullet points only."
QUESTIONS = [
    "What do bees do?",
    "What should I pack for a week by the sea?",
    "Why do people sing?",
    "What is in a forest?",
]


def bullets(text: str) -> int:
    """How many lines of a text are bullet points."""
    return sum(line.lstrip().startswith(("* ", "- ", "• ")) for line in text.splitlines())


lm = LM.load()
queries = (DATA / "cooking.txt").read_text().splitlines()
pairs = [Pair(positive=f"{query} {INSTRUCTION}", negative=query, shape="prompts") for query in queries]
steering = learn_instruct(lm, pairs, layers=9, operation="add")
prompts = [f"{question} {INSTRUCTION}" for question in QUESTIONS]
unsteered = lm.generate(prompts, max_new_tokens=64)
steered = lm.generate(prompts, 1.2 * steering, max_new_tokens=64)
for question, plain, answer in zip(QUESTIONS, unsteered, steered, strict=True):
    print(f"{question} {bullets(plain.text)} bullet points unsteered, {bullets(answer.text)} steered")
print(f"\n{steered[0].text}")
