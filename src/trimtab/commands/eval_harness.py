"""`trimtab eval lm-eval`: the tasks of EleutherAI's evaluation harness, steered."""

from __future__ import annotations

import sys
from importlib import import_module

import typer

from trimtab.commands.eval import evaluations


@evaluations.command(name="lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lm_eval(context: typer.Context) -> None:
    """EleutherAI's evaluation harness: all its tasks, steered. Needs the extra lm-eval.

    [bold]  trimtab eval lm-eval --tasks hellaswag --limit 100 --batch_size 16 \\
        --model_args pretrained=Qwen/Qwen2.5-0.5B,steer=caps.safetensors:2
      trimtab eval lm-eval ls tasks[/bold]

    This is the harness's own program with one additional model class: trimtab, the
    default here. All options are passed to it unchanged, so they have underscores. In
    --model_args, in addition to those of the class hf (pretrained, dtype, peft …):

    [dim]    steer=FILE[@LAYERS][:STRENGTH] a steering; without it, results are those of hf
        transfer=True                  allow one learned on another model of the same width
        layers_path=model.layers       where the blocks are, if trimtab can't find them[/dim]

    A comma ends an argument there, so write layers as one (@14) or as a range (@10-14).
    A task's context is the prompt, and the text that it scores or generates is the
    answer, so a steering from the last prompt token on acts on the answer. Don't share
    --use_cache between steerings: the harness keys its cache by requests only.
    """
    import_module("trimtab.evaluate.harness")  # registers the model class, or reports that the harness isn't installed
    from lm_eval.__main__ import cli_evaluate

    arguments = list(context.args)
    commands = ("run", "ls", "validate")
    runs = not arguments or arguments[0] not in commands[1:]
    if runs:
        arguments = arguments[1:] if arguments and arguments[0] == "run" else arguments
        named = any(word.partition("=")[0] in ("-M", "--model", "-C", "--config") for word in arguments)
        arguments = ["run", *([] if named else ["--model", "trimtab"]), *arguments]
    before, sys.argv = sys.argv, ["lm-eval", *arguments]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
