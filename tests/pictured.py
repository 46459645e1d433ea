"""Tiny random image-text models of several families with tiny processors, and small images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tiny import LAYERS, SIZES, VISION, VOCABULARY, WIDTH
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from trimtab.lm import LM

KINDS = ("llava", "gemma3", "qwen2_vl", "idefics3", "mllama")
TEMPLATE = """{% for m in messages %}{{ m['role'][0] }} {% if m['content'] is string %}{{ m['content'] }}{% else %}\
{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %} {% endfor %}\
{% endif %} / {% endfor %}{% if add_generation_prompt %}a {% endif %}"""
PARTS_ALONE = """{% for m in messages %}{{ m['role'][0] }} {% for p in m['content'] %}\
{% if p['type'] == 'image' %}IMAGE {% elif p['type'] == 'text' %}{{ p['text'] }} {% endif %}{% endfor %}/ {% endfor %}\
{% if add_generation_prompt %}a {% endif %}"""
MARK = 88
"""The token that stands where an image does."""


def image(seed: int = 0, width: int = 20, height: int = 16) -> Any:
    """An image of noise."""
    from PIL import Image

    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def image_prompt(*parts: Any, role: str = "user") -> list[dict[str, Any]]:
    """One message of these texts and images."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    return [{"role": role, "content": content}]


NOT_BEFORE = {
    "idefics3": ("5.20", "its image processor needs torchvision in this transformers"),
    "mllama": ("5.20", "attention to images has no keys in a decoding step of this transformers"),
}
"""From which transformers on a family runs here, and what is missing before."""


def pictured(kind: str, seed: int = 0) -> LM:
    """A model in float64 with its processor; the test is skipped where this transformers has none."""
    if kind in NOT_BEFORE and Version(transformers.__version__) < Version(NOT_BEFORE[kind][0]):
        pytest.skip(NOT_BEFORE[kind][1])
    torch.manual_seed(seed)
    model, processor = _MAKERS[kind]()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.2)
            elif kind == "mllama" and weight.numel() == 1:
                weight.fill_(0.5)  # gates of attention to images, which are shut in a fresh model
    if kind != "llava":  # there the processor alone has one
        processor.tokenizer.chat_template = processor.chat_template
    return LM(model.double().eval(), processor.tokenizer, processor=processor, name=f"tiny {kind}")


def tokenizer(marks: dict[int, str], **named: str) -> PreTrainedTokenizerFast:
    """Words `w6` … `w84`, roles, and the marks of images. `named` are special tokens that a processor asks for."""
    names = {0: "<pad>", 1: "<s>", 2: "<unk>", 3: "u", 4: "a", 5: "/", **marks}
    vocabulary = {names.get(i, f"w{i}"): i for i in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>"}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, extra_special_tokens=list(marks.values()), **special)
    for name, token in named.items():
        setattr(made, name, token)
        setattr(made, f"{name}_id", next(i for i, text in marks.items() if text == token))
    made.padding_side = "left"
    return made


def _template(mark: str) -> str:
    return TEMPLATE.replace("IMAGE", mark)


def _llava() -> tuple[Any, Any]:
    config = transformers.LlavaConfig(
        text_config={**SIZES, "model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8},
        image_token_id=MARK,
        image_token_index=MARK,
        vision_feature_layer=-1,
    )
    pixels = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    rest: dict[str, Any] = {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    words = tokenizer({MARK: "<image>"})
    processor = transformers.LlavaProcessor(pixels, words, patch_size=8, chat_template=_template("<image>"), **rest)
    return transformers.LlavaForConditionalGeneration(config), processor


def _gemma3() -> tuple[Any, Any]:
    config = transformers.Gemma3Config(
        text_config={**SIZES, "head_dim": 8, "sliding_window": 6, "model_type": "gemma3_text"},
        vision_config={**VISION, "image_size": 16, "patch_size": 8, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_id=MARK,
        image_token_index=MARK,
        boi_token_index=86,
        eoi_token_index=87,
    )
    named = {"image_token": "<soft>", "boi_token": "<begin>", "eoi_token": "<end>"}
    words = tokenizer({MARK: "<soft>", 86: "<begin>", 87: "<end>"}, **named)
    pixels = transformers.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    processor = transformers.Gemma3Processor(pixels, words, image_seq_length=4, chat_template=_template("<begin>"))
    return transformers.Gemma3ForConditionalGeneration(config), processor


class _NoVideos(transformers.Qwen2VLProcessor):
    """Without a processor of videos, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token, self.image_token_id, self.video_token, self.video_token_id = "<image>", MARK, "<video>", 87
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def _qwen2_vl() -> tuple[Any, Any]:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "patch_size": 8, "mlp_ratio": 1}
    config = transformers.Qwen2VLConfig(
        text_config={**SIZES, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=MARK,
        video_token_id=87,
        vision_start_token_id=86,
        vision_end_token_id=85,
    )
    size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    pixels = transformers.Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=size)
    words = tokenizer({MARK: "<image>", 87: "<video>", 86: "<start>", 85: "<end>"})
    processor = _NoVideos(pixels, words, chat_template=_template("<start> <image> <end>"))
    return transformers.Qwen2VLForConditionalGeneration(config), processor


def _idefics3() -> tuple[Any, Any]:
    config = transformers.Idefics3Config(
        text_config={**SIZES, "model_type": "llama"},
        vision_config={**VISION, "image_size": 16, "patch_size": 8},
        image_token_id=MARK,
        scale_factor=2,
    )
    marks = {MARK: "<image>", 86: "<fake_token_around_image>", 87: "<global-img>", 85: "<end_of_utterance>"}
    edge = {"longest_edge": 16}
    pixels = transformers.Idefics3ImageProcessorPil(size=edge, max_image_size=edge, do_image_splitting=False)
    words = tokenizer(marks)
    processor = transformers.Idefics3Processor(pixels, words, image_seq_len=1, chat_template=_template("<image>"))
    return transformers.Idefics3ForConditionalGeneration(config), processor


def _mllama() -> tuple[Any, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = transformers.MllamaConfig(
        text_config={**SIZES, "cross_attention_layers": [2], "rope_parameters": rope},
        vision_config={
            "hidden_size": 16,
            "attention_heads": 2,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "intermediate_size": 16,
            "vision_output_dim": 32,
            "image_size": 16,
            "patch_size": 8,
            "max_num_tiles": 1,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=MARK,
    )
    pixels = transformers.MllamaImageProcessorPil(size={"height": 16, "width": 16}, max_image_tiles=1)
    words = tokenizer({MARK: "<|image|>"})
    processor = transformers.MllamaProcessor(pixels, words, chat_template=_template("<|image|>"))
    return transformers.MllamaForConditionalGeneration(config), processor


_MAKERS = {"llava": _llava, "gemma3": _gemma3, "qwen2_vl": _qwen2_vl, "idefics3": _idefics3, "mllama": _mllama}
assert LAYERS == 4
