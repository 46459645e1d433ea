"""Sites inside of blocks: where they are found, what acts there, and what each of several workers does of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_parts import RULES, Recorded, start
from test_static_kernel import ALL
from tiny import WIDTH, direction, naive_together, read_write
from torch import nn

from trimtab import (
    Ablate,
    Add,
    BiasScores,
    Edit,
    Positions,
    ScaleElements,
    ScaleKeys,
    ScaleScores,
    Site,
    Steering,
    TargetMass,
    Threshold,
    TrimtabError,
    UnsupportedError,
    by_keys,
)
from trimtab.engines.folding import slots_at
from trimtab.engines.vllm import operator
from trimtab.engines.vllm.admission import check_supported
from trimtab.engines.vllm.attach import INSIDE, attach, find_places
from trimtab.engines.vllm.bank import Bank
from trimtab.engines.vllm.capacity import Capacity
from trimtab.engines.vllm.core import block_keys
from trimtab.engines.vllm.forms import capacity_for, forms_of
from trimtab.engines.vllm.frontend import Link, Names, send
from trimtab.engines.vllm.lm import VllmLM
from trimtab.engines.vllm.maps import Maps
from trimtab.engines.vllm.program import IdentifiedEdit
from trimtab.engines.vllm.settings import settings_from_environment
from trimtab.engines.vllm.shards import Shard
from trimtab.engines.vllm.steering_manager import Chunks, SteeringManager
from trimtab.engines.vllm.wire import Reading, Wire
from trimtab.steering import emphasis

HEADS, NEURONS, KEYS = 48, 80, 24
WIDTHS = {"residual": WIDTH, "heads": HEADS, "neurons": NEURONS, "attention": WIDTH, "mlp": WIDTH, "keys": KEYS}


class RowParallelLinear(nn.Linear):
    """As vLLM's: a worker has a part of the input."""

    def __init__(self, inputs: int, workers: int = 1) -> None:
        super().__init__(inputs // workers, WIDTH, bias=False, dtype=torch.float64)
        self.input_size, self.input_size_per_partition = inputs, inputs // workers


class Attention(nn.Module):
    """What vLLM's attention is called. Its output here is some function of each token's query, key and value."""

    head_size, kv_sharing_target_layer_name = 8, None

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.num_kv_heads = max(1, KEYS // self.head_size // workers)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return query + value * torch.tanh(key).sum(-1, keepdim=True)


class SelfAttention(nn.Module):
    def __init__(self, workers: int) -> None:
        super().__init__()
        self.attn, self.o_proj = Attention(workers), RowParallelLinear(HEADS, workers)
        self.widths = (HEADS // workers, self.attn.num_kv_heads * self.attn.head_size, HEADS // workers)
        self.inner = nn.Linear(WIDTH, sum(self.widths), dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.attn(*self.inner(x).split(self.widths, -1)))


class Mlp(nn.Module):
    def __init__(self, workers: int) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, NEURONS // workers, dtype=torch.float64)
        self.down_proj = RowParallelLinear(NEURONS, workers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(torch.relu(self.up(x)))


class Block(nn.Module):
    def __init__(self, workers: int = 1) -> None:
        super().__init__()
        self.norm = nn.Identity()
        self.self_attn, self.mlp = SelfAttention(workers), Mlp(workers)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = x + self.self_attn(x)
        return self.mlp(residual), residual


def size(kind: str, seed: int, norm: float = 1.0) -> torch.Tensor:
    vector = torch.randn(WIDTHS[kind], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return norm * vector / vector.norm()


def edits(kind: str) -> list[Edit]:
    site = Site(1, kind)
    gate = Threshold(site, size(kind, 5), 0.0, each_token=True)
    return [
        Edit(site, Add(size(kind, 1, 2.0)), RULES[0]),
        Edit(site, ScaleElements((size(kind, 2) > 0).double()), RULES[0]),
        Edit(site, Ablate(size(kind, 3)), RULES[0], gate=gate),
        Edit(site, read_write(4, 2, WIDTHS[kind], low=0.0), RULES[0]),
        Edit(site, Add(size(kind, 6), keep_norm=True), RULES[0]),
    ]


def steered(block: nn.Module, static: bool) -> SteeringManager:
    """A rig at all sites of two blocks, the second of which is this one."""
    places = find_places({0: Block(), 1: block}, WIDTH, INSIDE)
    sites = {site: place.width for site, place in places.items()}
    device = torch.device("cpu")
    bank = Bank((0, 1), WIDTH, 8, 64, torch.float64, device)
    maps = Maps(ALL, sites, 8, 64, torch.float64, device) if static else None
    worker = SteeringManager(sites, torch.float64, device, bank, static, ALL, maps)
    operator.MANAGERS.append(worker)
    attach(places, len(operator.MANAGERS) - 1)
    return worker


class TestActing:
    @pytest.mark.parametrize("static", [False, True], ids=["in Python", "replayed"])
    @pytest.mark.parametrize("number", range(5), ids=["add", "scale", "gated ablation", "map", "kept norm"])
    @pytest.mark.parametrize("kind", INSIDE)
    def test_an_edit_changes_what_stands_there(self, kind: str, number: int, static: bool) -> None:
        """As the block with the formula in its place, and so does what is read there; later tokens are as they were."""
        torch.manual_seed(number)
        block = Block()
        edit = replace(edits(kind)[number], positions=Positions.span(0, 3))
        x = torch.randn(5, WIDTH, dtype=torch.float64)
        plain, wanted = block(x), self.naive(block, x, edit)
        worker = steered(block, static)
        start(worker, "a", Steering((edit,)), 5)
        program = worker.programs["a"]
        worker.programs["a"] = replace(program, reading=Reading("r", (Site(1, kind),), (1, 4)))
        with torch.no_grad():
            if static:
                buffer = torch.zeros_like(x)
                with Recorded() as graph:
                    outcome = block(buffer)
            worker.expect({"a": 5})
            worker.begin(Chunks(["a"], [0], [5]))
            if static:
                buffer.copy_(x)
                graph.replay()
                worker.end()
                read = worker.pop_reading("r")[Site(1, kind)]
                torch.testing.assert_close(read, wanted[1][[1, 4]])
                return
            outcome = block(x)
            receipt = worker.end()
        assert receipt is not None
        assert receipt.resolve_faults() == {}
        torch.testing.assert_close(sum(outcome), sum(wanted[0]))
        assert torch.equal(sum(outcome)[3:], sum(plain)[3:])
        changed = not torch.equal(sum(wanted[0])[:3], sum(plain)[:3])  # a gate may be shut at all three
        assert torch.equal(sum(outcome)[:3], sum(plain)[:3]) != changed
        assert changed or number == 2
        torch.testing.assert_close(worker.pop_reading("r")[Site(1, kind)], wanted[1][[1, 4]])

    def naive(self, block: Any, x: torch.Tensor, edit: Edit) -> tuple[Any, torch.Tensor]:
        """The block's outcome, and what stands at the site, with the edit's formula in hooks that loop over tokens."""
        linear = {"heads": block.self_attn.o_proj, "neurons": block.mlp.down_proj}.get(edit.site.kind)
        part = {"attention": block.self_attn, "mlp": block.mlp}.get(edit.site.kind)
        seen = []

        def changed(value: torch.Tensor) -> torch.Tensor:
            new = value.clone()
            for t in range(3):
                gate: Any = edit.gate
                if not gate.token_sites or float(value[t] @ gate.direction) > gate.threshold:
                    new[t] = self.formula(edit, value[t])
            seen.append(new)
            return new

        if edit.site.kind == "keys":
            handle = block.self_attn.attn.register_forward_pre_hook(lambda _m, a: (a[0], changed(a[1]), a[2]))
        elif linear is not None:
            handle = linear.register_forward_pre_hook(lambda _m, args: (changed(args[0]),))
        else:
            assert part is not None
            handle = part.register_forward_hook(lambda _m, _a, output: changed(output))
        with torch.no_grad():
            outcome = block(x)
        handle.remove()
        return outcome, seen[0]

    def formula(self, edit: Edit, x: torch.Tensor) -> torch.Tensor:
        if isinstance(edit.operation, ScaleElements):
            return x * (1 + edit.strength * edit.operation.direction)
        return naive_together([edit], x)

    def test_a_site_that_isnt_run_is_a_fault(self) -> None:
        block = Block()
        worker = steered(block, False)
        start(worker, "a", Steering((edits("heads")[0],)), 5)
        block.self_attn.o_proj._forward_pre_hooks.clear()
        worker.expect({"a": 5})
        worker.begin(Chunks(["a"], [0], [5]))
        with torch.no_grad():
            block(torch.randn(5, WIDTH, dtype=torch.float64))
        receipt = worker.end()
        assert receipt is not None
        assert "at heads[1] the steering should have run once" in receipt.resolve_faults()["a"]


class TestFinding:
    def test_what_isnt_one_attention_and_one_mlp_is_refused(self) -> None:
        block: Any = Block()
        assert list(find_places({3: block}, WIDTH, ())) == [Site(3)]
        assert list(find_places({3: block}, WIDTH, ("heads",))) == [Site(3, "heads"), Site(3)]
        block.more = Mlp(1)
        with pytest.raises(UnsupportedError, match=r"the sites inside block 3 .* more isn't a single attention or MLP"):
            find_places({3: block}, WIDTH, ("heads",))
        del block.more, block.mlp
        with pytest.raises(UnsupportedError, match="which has heads, attention"):
            find_places({3: block}, WIDTH, ("heads",))

    def test_keys_of_its_own_and_alike(self) -> None:
        block: Any = Block()
        places = find_places({3: block}, WIDTH, ("keys",), key_heads=6)
        assert list(places) == [Site(3, "keys"), Site(3)]
        assert (places[Site(3, "keys")].width, places[Site(3, "keys")].whole) == (KEYS, 2 * KEYS)
        other: Any = Block()
        other.self_attn.attn.num_kv_heads = 1
        with pytest.raises(UnsupportedError, match="have several widths \\(8, 24\\)"):
            find_places({2: other, 3: block}, WIDTH, ("keys",))
        block.self_attn.attn.kv_sharing_target_layer_name = "model.layers.1"
        with pytest.raises(UnsupportedError, match="block 3 of this model, which shares its keys with another block"):
            find_places({3: block}, WIDTH, ("keys",))
        block.self_attn.attn = nn.Identity()
        with pytest.raises(UnsupportedError, match="which has 0 attentions over keys"):
            find_places({3: block}, WIDTH, ("keys",))

    def test_the_environment_names_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert settings_from_environment(sites={"mlp"}).sites == ("mlp",)
        monkeypatch.setenv("TRIMTAB_SITES", "residual, neurons,heads")
        assert settings_from_environment(sites={"mlp"}).sites == ("heads", "neurons")
        monkeypatch.setenv("TRIMTAB_SITES", "scores")
        with pytest.raises(TrimtabError, match=r"TRIMTAB_SITES lists kinds of sites \(heads, .*\), got 'scores'"):
            settings_from_environment()


class TestAdmission:
    def test_sites_that_the_engine_wasnt_started_with_are_refused(self) -> None:
        for kind in INSIDE:
            steering = Steering((edits(kind)[0],))
            check_supported(steering, layers=2, widths=WIDTHS)
            with pytest.raises(UnsupportedError, match=f"inside a block; start the engine with TRIMTAB_SITES={kind}"):
                check_supported(steering, layers=2, widths={"residual": WIDTH})
        with pytest.raises(TrimtabError, match=r"width is 32, this model's is 48 at heads\[1\]"):
            check_supported(Steering((Edit(Site(1, "heads"), Add(direction(1))),)), layers=2, widths=WIDTHS)

    def test_what_takes_a_whole_activation_isnt_split(self) -> None:
        for number, fine in enumerate((True, True, False, False, False)):
            steering = Steering((edits("heads")[number],))
            if fine:
                check_supported(steering, layers=2, widths=WIDTHS, split={"heads"})
                continue
            with pytest.raises(UnsupportedError, match="heads are split over tensor-parallel workers"):
                check_supported(steering, layers=2, widths=WIDTHS, split={"heads"})
        check_supported(Steering(tuple(edits("mlp"))), layers=2, widths=WIDTHS, split={"heads", "neurons"})


def test_each_worker_does_its_part() -> None:
    """The parts of two workers, side by side, are the whole; and a wire of a reading tells its sites."""
    x = torch.randn(5, HEADS, dtype=torch.float64)
    for edit in edits("heads")[:2]:
        parts = []
        for rank in range(2):
            places = find_places({1: Block(2)}, WIDTH, INSIDE)
            sites = {site: place.width for site, place in places.items()}
            assert sites[Site(1, "heads")] == HEADS // 2
            bank = Bank((1,), WIDTH, 8, 64, torch.float64, torch.device("cpu"))
            shard = Shard({"heads": HEADS, "neurons": NEURONS}, 2, rank)
            worker = SteeringManager(sites, torch.float64, torch.device("cpu"), bank, shard=shard)
            start(worker, "a", Steering((edit,)), 5)
            worker.begin(Chunks(["a"], [0], [5]))
            parts.append(x.chunk(2, -1)[rank].clone())
            worker.apply(Site(1, "heads"), parts[-1], None)
        vector = edit.operation.direction
        wanted = x + vector if isinstance(edit.operation, Add) else x * (1 + vector)
        torch.testing.assert_close(torch.cat(parts, -1), wanted)
    wire = Wire((), Reading("r", (Site(1, "heads"), Site(2)), (0, 3)), 4)
    assert Wire.from_plain(wire.to_plain()) == wire


def test_heads_of_keys_that_several_workers_have() -> None:
    """Three heads of eight over six workers: two workers have each; a factor is every worker's."""
    vector = torch.arange(float(KEYS))
    for rank in range(6):
        shard = Shard({"keys": KEYS}, 6, rank, {"keys": 8})
        part = shard.of(IdentifiedEdit("v", Edit(Site(1, "keys"), Add(vector)))).edit.operation
        assert torch.equal(part.direction, vector[rank // 2 * 8 :][:8])
        whole = IdentifiedEdit("s", Edit(Site(1, "keys"), ScaleKeys(2.0)))
        assert shard.of(whole) == whole


class TestEmphasis:
    """Scores that are scaled are keys that are scaled, in the engine and at its start; no other operation is there."""

    def test_it_is_admitted_and_sent_as_keys(self) -> None:
        link = Link(8, 4, WIDTH, True, capacity=Capacity(scales=True), maps=4, inside={"keys": KEYS})
        emphasized = emphasis(ScaleScores(4.0), [(1, 3), (5, 6)], range(4))
        sent = send(link, 0.5 * emphasized)
        assert next(sent)[0] == "trimtab_put"
        with pytest.raises(StopIteration) as done:
            next(sent)
        part = done.value.value
        assert link.sent[part.digest] == by_keys(emphasized)
        placed = link.wire_for_prompt(Wire((part,)), 9)
        assert [(span.start, span.stop, span.banked, span.mapped) for span in placed.spans] == [
            (1, 3, False, True),
            (5, 6, False, True),
        ]
        assert [block_keys(placed, start, start + 4) != [] for start in (0, 4, 8)] == [True, True, False]
        with pytest.raises(UnsupportedError, match="scaled elements"):
            Link(8, 4, WIDTH, True, capacity=Capacity(rank=4), inside={"keys": KEYS}).check(emphasized)
        with pytest.raises(UnsupportedError, match="TRIMTAB_SITES=keys"):
            Link(8, 4, WIDTH, False).check(emphasized)

    def test_what_it_cant_be_is_refused_by_name(self) -> None:
        for operation, name in ((BiasScores(1.0), "bias_scores"), (TargetMass(0.2), "target_mass")):
            with pytest.raises(UnsupportedError, match=f"can't run {name}: .* scaling keys"):
                Link(8, 4, WIDTH, False, inside={"keys": KEYS}).check(emphasis(operation, [(0, 2)], [1]))
        assert "rejection" in VllmLM.cannot

    def test_an_engine_is_started_for_what_is_registered(self) -> None:
        names = Names()
        names.register("heed", emphasis(ScaleScores(4.0), [(1, 3)], (0, 2)))
        assert names.sites() == {"keys"}
        assert names.capacity() == Capacity(scales=True, layers=(0, 2))

    def test_factors_fold_with_what_is_as_wide_as_the_keys(self) -> None:
        """In one form, whichever comes first, as the kernels give it one after the other."""
        x, site = torch.randn(5, KEYS, dtype=torch.float64), Site(1, "keys")
        several = [Edit(site, ScaleKeys(3.0), Positions.all(), 0.5), *edits("keys")[:2], edits("keys")[3]]
        for chosen in (several[:1], several[:2], several[::-1], several):
            (form,) = forms_of(slots_at(tuple(chosen), site))
            wanted = x
            for edit in chosen:
                factor = edit.operation.alpha**edit.strength if isinstance(edit.operation, ScaleKeys) else None
                wanted = wanted * factor if factor else torch.stack([TestActing().formula(edit, t) for t in wanted])
            z = torch.clamp(x @ form.read.T + form.bias, form.low, form.high) if len(form.read) else None
            folded = x * form.factor if form.factor is not None else x
            folded = folded if z is None else folded + z @ form.write
            torch.testing.assert_close(folded if form.vector is None else folded + form.vector, wanted)

    def test_room_for_scaling_alone_is_enough(self) -> None:
        """In banks that hold no rows of a map, as an engine has them that starts with emphasis."""
        site, device = Site(1, "keys"), torch.device("cpu")
        emphasized = emphasis(ScaleKeys(4.0), [(1, 3)], [1])
        capacity = capacity_for(emphasized)
        assert capacity == Capacity(scales=True, layers=(1,))
        maps = Maps(capacity, {site: KEYS}, 3, 64, torch.float64, device)
        bank = Bank((1,), WIDTH, 3, 64, torch.float64, device)
        worker = SteeringManager({site: KEYS, Site(1): WIDTH}, torch.float64, device, bank, True, capacity, maps)
        start(worker, "a", 0.5 * emphasized, 5)
        worker.begin(Chunks(["a"], [0], [5]))
        x = torch.randn(5, KEYS, dtype=torch.float64)
        result = x.clone()
        worker.apply(site, result, None)
        torch.testing.assert_close(result[1:3], 2 * x[1:3])
        assert torch.equal(result[[0, 3, 4]], x[[0, 3, 4]])
