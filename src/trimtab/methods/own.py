"""What trimtab's own methods say of themselves, so that help and lists wait for no torch: one recipe each.

What other distributions bring is found by their entry points: see `trimtab.methods.recipe`.
"""

from __future__ import annotations

from trimtab.methods.recipe import Option, Recipe

OWN = (
    Recipe(
        name="actadd",
        title="activation addition",
        paper="Turner et al., 2023, arXiv 2308.10248",
        takes="nothing",
        data="two short texts, no more",
        reads="every token of the two texts, at a block's input",
        acts="adds at one block's input (default: 1/8 of the depth), at the prompt's first tokens",
        sites="block_input",
        cost="nothing a generated token: it acts on the prompt only",
        function="trimtab.methods.actadd:learn_actadd",
        options=(
            Option("positive", "str", None, "The text to go towards, such as Love."),
            Option("negative", "str", None, "The text to go away from, such as Hate."),
            Option("coefficient", "float", 5.0, "How many times the difference is added (c)."),
            Option("align", "str", "front", "At the prompt's first tokens, or its last.", choices=("front", "back")),
        ),
    ),
    Recipe(
        name="bipo",
        title="a vector by bi-directional preference optimization",
        paper="Cao et al., NeurIPS 2024, arXiv 2406.00045",
        shapes=("answers",),
        data="prompt + positive (preferred) + negative, some dozens or more",
        reads="the answers' tokens, teacher-forced, with gradients",
        acts="adds at one block (default: 0.47 of the depth), from the last prompt token on; -1 prefers the negatives",
        function="trimtab.methods.bipo:learn_bipo",
        options=(
            Option(
                "beta", "float", 0.1, "How soon a preference is strong enough: the scale of log-ratios in the loss."
            ),
            Option("steps", "int", 40, "Steps of gradient descent, at most."),
            Option("rate", "float", 0.01, "Adam's learning rate, in units of the activations' root mean square."),
            Option("max_dose", "float", 1.0, "The vector's greatest length, in typical activations."),
            Option("held_out", "pairs", None, "Pairs that decide when to stop (default: one prompt in eight)."),
            Option("seed", "int", 0, "Of the order of the pairs, and of the signs."),
        ),
    ),
    Recipe(
        name="caa",
        title="contrastive activation addition",
        paper="Rimsky et al., ACL 2024, arXiv 2312.06681",
        shapes=("letters", "answers", "texts"),
        data="question + answer_matching_behavior + answer_not_matching_behavior; or positive + negative (+ prompt, and"
        " system prompts)",
        reads="the answer's letter, or the last token of a text, or several tokens of it",
        acts="adds at one block (default: 0.4 of the depth), from the last prompt token on",
        cost="one addition at one layer a token",
        function="trimtab.methods.caa:learn_caa",
        options=(
            Option(
                "read_at",
                "str",
                None,
                "Where an answer is read: last, or the mean over all of it (answer), over its first tokens (first:8),"
                " or"
                " over those after a text (after:MARKER). Default: the letter of letters, else last.",
            ),
            Option(
                "estimator",
                "str",
                "mean-difference",
                "How a direction comes of the activations: their mean difference, its median, the first principal"
                " component of centred members, or a probe's weight.",
                choices=("mean-difference", "median", "pca", "probe"),
            ),
        ),
    ),
    Recipe(
        name="cap",
        title="activation capping",
        paper="Lu et al., 2026, arXiv 2601.10387",
        shapes=("answers", "texts"),
        data="prompt + positive (wanted) + negative, some dozens or more",
        reads="all tokens of the answers",
        acts="raises projections that are below the cap, at blocks from 0.7 to 0.85 of the depth, at all tokens but the"
        " first",
        cost="one projection a layer and token",
        function="trimtab.methods.cap:learn_cap",
        options=(
            Option("quantile", "float", 0.25, "Which quantile of the answers' projections the cap is, 0 to 1."),
            Option("over", "str", "wanted", "Of which answers' projections.", choices=("wanted", "both")),
            Option(
                "bound",
                "str",
                "floor",
                "Keep projections above the positives' low ones, or what positives have below the negatives' high"
                " ones.",
                choices=("floor", "ceiling"),
            ),
            Option("positions", "positions", None, "At which tokens (default: all but the first)."),
        ),
    ),
    Recipe(
        name="cast",
        title="conditional activation steering",
        paper="Lee et al., ICLR 2025, arXiv 2409.05907",
        shapes=("answers", "texts"),
        data="prompt + positive + negative for the behaviour; prompts that should trigger it, and others",
        reads="the answers' tokens, and the prompts'",
        acts="adds at blocks from 0.3 to 0.5 of the depth, at every token, where the prompt meets the condition",
        cost="one addition a layer and token; a reading of the prompt where the condition isn't below all steered"
        " layers",
        function="trimtab.methods.cast:learn_cast",
        options=(
            Option("when", "texts", None, "Prompts on which the behaviour should act."),
            Option("unless", "texts", None, "Prompts on which it should not."),
            Option("coefficient", "float", 0.2, "The length of the push, in shares of the mean activation's."),
            Option("behaviour", "str", "pca", "The behaviour's direction.", choices=("pca", "mean")),
            Option(
                "measure",
                "str",
                "dot",
                "The condition's measure (the paper's: cast).",
                choices=("dot", "cosine", "ratio", "cast"),
            ),
            Option(
                "pool", "str", "unit-mean", "How tokens are pooled (the paper's: mean).", choices=("unit-mean", "mean")
            ),
            Option("choice", "str", "f1", "Which threshold is best.", choices=("f1", "youden")),
            Option("condition_layer", "int", None, "Where the condition reads (default: best below the behaviour)."),
        ),
    ),
    Recipe(
        name="distill",
        title="a prompt compiled into an edit",
        paper="prompt distillation (Askell et al., arXiv 2112.00861) into activations; closed form: PSR, arXiv"
        " 2605.03907",
        takes="nothing",
        data="an instruction, a system message, a text or examples, and the model's own answers under it",
        reads="the answers' tokens, with and without the prompt",
        acts="a low-rank map at every block (default), or a vector, from the last prompt token on",
        cost="two products of 8 rows a layer and token; of rank 0 one addition",
        function="trimtab.methods.distill:learn_distill",
    ),
    Recipe(
        name="hpr",
        title="Householder pseudo-rotation",
        paper="Pham and Nguyen, EMNLP 2024, arXiv 2409.10053",
        shapes=("answers", "texts"),
        data="prompt + positive + negative, a few hundred or more",
        reads="all tokens of the answers from where the two part, at every block",
        acts="turns activations on the wrong side of a probe, at the best 5 blocks, from the last prompt token on",
        cost="a small network a layer and token (none with --turn fixed or reflect)",
        function="trimtab.methods.hpr:learn_hpr",
        options=(
            Option("keep", "int", 5, "So many layers, those whose probes are best on held-out pairs."),
            Option(
                "turn",
                "str",
                "predicted",
                "By a predicted angle, the mean angle of the pairs, or the reflection.",
                choices=("predicted", "fixed", "reflect"),
            ),
            Option("alpha", "float", 1.0, "Multiplies the angle."),
            Option("epochs", "int", 5, "Of training the angle network."),
            Option("seed", "int", 0, "Of the network's first weights and the order of its batches."),
            Option("positions", "positions", None, "At which tokens (default: from the last prompt token on)."),
        ),
    ),
    Recipe(
        name="icv",
        title="in-context vectors",
        paper="Liu et al., ICML 2024, arXiv 2311.06668",
        shapes=("texts", "answers"),
        data="a few demonstrations: negative is a text as it is (x), positive as it should be (y)",
        reads="the last token of a text, at every block",
        acts="turns the output of every MLP towards the vector, norm kept, at every token",
        sites="mlp",
        cost="a projection, a norm and an addition a layer and token",
        function="trimtab.methods.icv:learn_icv",
        options=(
            Option("scale", "float", 0.1, "Lambda: the push, in shares of the activation (paper: 0.10 to 0.12)."),
            Option(
                "estimator",
                "str",
                "mean",
                "What the differences share: their mean, their median, their first direction, not centred, or what a"
                " probe tells the sides by.",
                choices=("mean", "median", "pca", "probe"),
            ),
            Option(
                "site",
                "str",
                "mlp",
                "Where it acts: the MLPs' outputs (the authors' code) or the residual stream (their text).",
                choices=("mlp", "residual"),
            ),
            Option("positions", "positions", None, "At which tokens (default: all)."),
        ),
    ),
    Recipe(
        name="inferaligner",
        title="cross-model guidance towards refusal of harmful prompts",
        paper="Wang et al., EMNLP 2024, arXiv 2401.11206",
        takes="texts",
        data="harmful prompts, and harmless ones",
        reads="the last token of each prompt",
        acts="adds at the middle third of the blocks, at every token, where the prompt reads as harmful",
        cost="one addition a layer and token, and where there is a gate a reading of the prompt",
        function="trimtab.methods.inferaligner:learn_inferaligner",
        options=(
            Option("harmless", "texts", None, "Prompts that are not harmful."),
            Option("alpha", "float", 1.0, "How many times the guide's difference is added."),
            Option("gate", "str", "each", "A gate a layer, or the best layer's for all.", choices=("each", "best")),
            Option(
                "threshold",
                "str",
                "midpoint",
                "Where a gate opens: half-way between the sides, or by its curve.",
                choices=("midpoint", "youden", "f1"),
            ),
            Option("positions", "positions", None, "At which tokens (default: all)."),
        ),
    ),
    Recipe(
        name="instruct",
        title="instruction vectors",
        paper="Stolfo et al., ICLR 2025, arXiv 2410.12877",
        shapes=("prompts", "texts"),
        data="prompt + prompt_without_instruction; or positive + negative, both prompts",
        reads="the last prompt token",
        acts="moves the projection at one block (default: 0.6 of the depth) to where the instruction puts it, at every"
        " token but the first; or adds",
        cost="one projection at one layer a token",
        function="trimtab.methods.instruct:learn_instruct",
    ),
    Recipe(
        name="iti",
        title="inference-time intervention",
        paper="Li et al., NeurIPS 2023, arXiv 2306.03341",
        shapes=("letters", "answers", "texts"),
        data="pairs of a true and a false answer, at least a few hundred",
        reads="every head's output at the answer's letter, or the last token of a text",
        acts="adds at the heads whose probes do best, from the last prompt token on",
        sites="heads",
        cost="one addition a token at each layer that has chosen heads",
        function="trimtab.methods.iti:learn_iti",
        options=(
            Option("heads", "int", 48, "How many heads, over all layers."),
            Option("alpha", "float", 15.0, "How far, in deviations of the activations along the direction."),
            Option("direction", "str", "mean", "The difference of means, or the probe's weight.", ("mean", "probe")),
            Option("validation", "float", 0.2, "The share of questions that heads are ranked on."),
            Option("seed", "int", 0, "Of the split into questions to fit and to rank on."),
            Option("bank", "texts", None, "Other texts to measure the deviation on. Without it: the pairs' own."),
            Option("positions", "positions", None, "At which tokens. Without it: from-last-prompt-token."),
        ),
    ),
    Recipe(
        name="loreft",
        title="low-rank representation finetuning",
        paper="Wu et al., NeurIPS 2024, arXiv 2404.03592",
        shapes=("answers",),
        data="prompt + positive (what is learned) + negative (what is only measured), some dozens or more",
        reads="the positive answers' tokens, teacher-forced, with gradients",
        acts="puts activations in a low-rank subspace where a linear map of them says, at four blocks, from the last"
        " prompt"
        " token on",
        cost="two products of `rank` rows a layer and token",
        function="trimtab.methods.loreft:learn_loreft",
        options=(
            Option("rank", "int", 4, "The dimension of the subspace at each block."),
            Option("steps", "int", 40, "Steps of gradient descent, at most."),
            Option("rate", "float", 0.01, "Adam's learning rate, in units of the activations' root mean square."),
            Option("held_out", "pairs", None, "Pairs that decide when to stop (default: one prompt in eight)."),
            Option("seed", "int", 0, "Of the first subspaces, and of the order of the pairs."),
        ),
    ),
    Recipe(
        name="random",
        title="norm-matched random control",
        paper="the control of Rimsky et al., ACL 2024, arXiv 2312.06681, and most others",
        takes="nothing",
        data="nothing, or a steering to imitate",
        reads="nothing",
        acts="as the steering it imitates; else adds at one block, from the last prompt token on",
        cost="what the steering that it imitates costs",
        function="trimtab.methods.random:learn_random",
        options=(
            Option("like", "steering", None, "A steering whose directions are replaced, at their norms."),
            Option("length", "float", 1.0, "Without --like: the length of the push at strength 1."),
            Option("seed", "int", 0, "Which directions are drawn."),
        ),
    ),
    Recipe(
        name="repe",
        title="representation reading and control",
        paper="Zou et al., 2023, arXiv 2310.01405",
        shapes=("texts", "answers"),
        data="positive + negative (+ prompt)",
        reads="the last token of a text, or several tokens of it",
        acts="adds a unit direction at the middle third of the blocks, at every token",
        cost="one addition a layer and token",
        function="trimtab.methods.repe:learn_repe",
        options=(
            Option(
                "reader",
                "str",
                "pca",
                "How a direction is read: principal component of centred members, of differences in random order, mean,"
                " median, or a probe's weight.",
                choices=("pca", "random-order", "cluster-mean", "median", "probe"),
            ),
            Option(
                "read_at",
                "str",
                "last",
                "Where an answer is read: last, or the mean over all of it (answer), over its first tokens (first:8),"
                " or"
                " over those after a text (after:MARKER).",
            ),
            Option("coefficient", "float", 1.0, "The length of the push, in shares of the mean activation's."),
            Option("control", "str", "add", "Add the direction, or what is there of it.", choices=("add", "sign")),
            Option("keep_norm", "bool", False, "Keep each activation's norm."),
            Option("positions", "positions", None, "At which tokens (default: all)."),
            Option("seed", "int", 0, "Of the random order."),
        ),
    ),
    Recipe(
        name="reps",
        title="a vector by reference-free preference steering",
        paper="Wu et al., NeurIPS 2025, arXiv 2505.20809",
        shapes=("answers",),
        data="prompt + positive (steered) + negative (as the model answers), some dozens or more",
        reads="the answers' tokens, teacher-forced, with gradients",
        acts="adds at one block (default: 0.4 of the depth), from the last prompt token on",
        function="trimtab.methods.reps:learn_reps",
        options=(
            Option("steps", "int", 40, "Steps of gradient descent, at most."),
            Option("rate", "float", 0.01, "Adam's learning rate, in units of the activations' root mean square."),
            Option("max_dose", "float", 1.0, "The vector's greatest length, in typical activations."),
            Option("held_out", "pairs", None, "Pairs that decide when to stop (default: one prompt in eight)."),
            Option("seed", "int", 0, "Of the first vector, the order of the pairs, and the steering factors."),
        ),
    ),
    Recipe(
        name="sadi",
        title="semantics-adaptive dynamic intervention",
        paper="Wang et al., ICLR 2025, arXiv 2410.12299",
        shapes=("letters", "answers", "texts"),
        data="pairs of a right and a wrong answer, hundreds of them",
        reads="the answer's letter, or the last token of a text, at heads, neurons or the MLP's output",
        acts="scales the most telling heads or elements, at the last prompt token",
        sites="heads, neurons or mlp",
        cost="nothing after the prompt; one multiplication a layer and token where it acts on generated tokens",
        function="trimtab.methods.sadi:learn_sadi",
        options=(
            Option(
                "site", "str", "heads", "Whole heads, neurons, or the MLP's output.", ("heads", "neurons", "hidden")
            ),
            Option("k", "int", None, "How many, over all layers. Without it: 8 heads, 100 neurons, 10 elements."),
            Option("delta", "float", 1.0, "By how much of themselves they grow."),
            Option("score", "str", "norm", "What they are chosen by (code: signed).", ("norm", "signed", "absolute")),
            Option("operation", "str", "scale", "scale, or add the mean difference under the mask.", ("scale", "add")),
            Option(
                "mode",
                "str",
                "live",
                "Layers see what was done before them, or (code: frozen) all of them scale what a clean pass had.",
                ("live", "frozen"),
            ),
            Option("positions", "positions", None, "At which tokens. Without it: last-prompt-token."),
        ),
    ),
    Recipe(
        name="safety",
        title="refusal of harmful requests, and of no others",
        paper="after Lee et al., ICLR 2025, arXiv 2409.05907, and Arditi et al., 2024, arXiv 2406.11717",
        takes="texts",
        data="harmful requests, and harmless ones, a hundred or more of each",
        reads="answers that refuse or comply, and the last token of each prompt",
        acts="adds at blocks from 0.3 to 0.5 of the depth, from the last prompt token on, where the prompt reads"
        " harmful",
        cost="one addition a layer and token",
        function="trimtab.methods.safety:learn_safety",
        options=(
            Option("harmless", "texts", None, "Requests that are to be answered, in form like the harmful ones."),
            Option(
                "direction",
                "str",
                "answers",
                "What refusal is read from: answers that refuse and comply, or harmful and harmless prompts.",
                choices=("answers", "prompts"),
            ),
            Option("coefficient", "float", 0.08, "The length of the push, in shares of the median activation's."),
            Option(
                "gate", "str", "inferaligner", "How a request is told to be harmful.", choices=("inferaligner", "cast")
            ),
            Option(
                "choice",
                "str",
                None,
                "CAST's gate: which threshold is best; youden if not given.",
                choices=("youden", "f1"),
            ),
            Option(
                "false_alarms", "float", None, "CAST's gate: at most this share of the harmless requests may open it."
            ),
            Option(
                "requests", "int", 24, "From so many requests of either kind refusing and complying answers are read."
            ),
            Option("positions", "positions", None, "At which tokens (default: from the last prompt token on)."),
        ),
    ),
    Recipe(
        name="sttp",
        title="steering to a target or mirror projection, at tokens that need it",
        paper="Herbster et al., 2026, arXiv 2604.08169",
        shapes=("answers", "texts"),
        data="prompt + positive (wanted) + negative, some dozens or more",
        reads="all tokens of the answers",
        acts="moves projections on the wrong side of a probe, at one block (default: 0.5 of the depth), at all tokens"
        " but"
        " the first",
        cost="a projection and a test a layer and token",
        function="trimtab.methods.sttp:learn_sttp",
        options=(
            Option(
                "move",
                "str",
                "target",
                "To where the wanted answers are (StTP), or as far beyond the probe's line as before it (StMP).",
                choices=("target", "mirror"),
            ),
            Option(
                "alpha", "float", 1.0, "StTP: standard deviations beyond the wanted mean; StMP: shares of the mirror."
            ),
            Option("positions", "positions", None, "At which tokens (default: all but the first)."),
        ),
    ),
    Recipe(
        name="tda",
        title="training-free dynamic activation",
        paper="Ma et al., 2024, arXiv 2408.11393",
        takes="texts",
        data="a few texts like those to be read, to calibrate on",
        reads="the MLPs' neurons at all tokens but the first",
        acts="switches off neurons that were small in the prompt, at generated tokens",
        sites="neurons",
        cost="a second reading of the prompt, and one multiplication a layer and token; saves nothing by itself",
        function="trimtab.methods.tda:learn_tda",
        options=(
            Option("cett", "float", 0.2, "What share of the MLP's output may be lost, on average."),
            Option("statistic", "str", "any", "A neuron's size over the prompt: its largest, or rms.", ("any", "rms")),
            Option("tokens", "int", 512, "Calibrate on at most so many tokens."),
        ),
    ),
)
