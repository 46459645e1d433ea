"""A persona from twenty pairs: learn a cheerful voice by CAA, look at layers and strengths, save it, use it.

python examples/persona.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from trimtab import LM, learn_caa, load, read_pairs, save

DATA = Path(__file__).parent / "data"
QUESTIONS = ["How was the concert last night?", "Tell me about your grandmother.", "Do you like your job?"]

lm = LM.load()  # SmolLM2-135M-Instruct; name a Hub id or a folder for another model
pairs = read_pairs(DATA / "cheerful.jsonl")
cheerful = learn_caa(lm, pairs, layers=[10, 12, 14], read_at="answer")

# Which layer, how strong? All settings and the unsteered model run as rows of one batch.
swept = lm.sweep(
    cheerful,
    layers=[10, 12, 14],
    strengths=[1, 2],
    prompts=QUESTIONS,
    check=lambda answer: "!" in answer,
    max_new_tokens=32,
)
print(f"unsteered: {swept.unsteered.passed:.0%} of answers exclaim")
for row in swept.rows:
    print(f"layer {row.layer}, strength {row.strength:g}: {row.passed:.0%} of answers exclaim, dose {row.dose:.2f}")

with TemporaryDirectory() as folder:
    path = Path(folder, "cheerful.safetensors")
    save(2 * cheerful[10], path)
    for question in QUESTIONS:
        unsteered, steered = lm.generate([question] * 2, [None, load(path)], max_new_tokens=32)
        print(f"\n{question}\n  unsteered: {unsteered.text}\n  cheerful:  {steered.text}")
