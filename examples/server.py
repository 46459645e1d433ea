"""Serve steerings over HTTP, and ask with OpenAI's client.

pip install 'trimtab[serve]' openai
python examples/server.py
"""

import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

from openai import OpenAI

from trimtab import LM, learn_caa, read_pairs, save

DATA = Path(__file__).parent / "data"

with TemporaryDirectory() as folder:
    lm = LM.load()
    cheerful = learn_caa(lm, read_pairs(DATA / "cheerful.jsonl"), layers=10, read_at="answer")
    save(cheerful, Path(folder, "cheerful.safetensors"))

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "trimtab", "serve", "--steerings", folder, "--port", str(port), "--no-playground"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):  # until it has loaded the model
            try:
                urlopen(f"http://127.0.0.1:{port}/readyz").close()
                break
            except OSError:
                time.sleep(1)
        else:
            raise SystemExit(f"the server didn't start; run {' '.join(command)} to see why")
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        for strength in (0, 2):
            answer = client.chat.completions.create(
                model="trimtab",
                messages=[{"role": "user", "content": "How was the concert last night?"}],
                temperature=0,
                max_tokens=32,
                extra_body={"steering": [{"name": "cheerful", "strength": strength}]},
            )
            print(f"strength {strength}: {answer.choices[0].message.content}")
    finally:
        server.terminate()
        server.wait()
