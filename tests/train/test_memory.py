"""What a step takes is counted exactly, promised for 12B, chosen by what is free, and given up rung by rung when it runs out."""

import pytest
import torch

from garage.core.errors import UserError
from garage.models.adapters import adapt
from garage.models.families import build, named
from garage.models.layers import Linear, Model
from garage.models.quantize import hold_embedding, quantised
from garage.models.recompute import Thrift
from garage.specs.train import LINEARS, RUNGS, FitSpec
from garage.train import budget, ladder, loop
from garage.train.budget import counted_step, layers_to_recompute, meta_twin, optimizer_bytes, step_budget
from garage.train.bytes import ByteCounter
from garage.train.ladder import Lean, OutOfMemory, lighter
from garage.train.loop import prepare
from garage.train.optim import make_optimizer


def test_the_counter_agrees_with_a_sum_by_hand():
    with ByteCounter() as counter:
        counter.phase = "a"
        first = torch.empty(256, dtype=torch.bfloat16, device="meta")  # 512 bytes
        product = first.view(16, 16) @ first.view(16, 16)  # as many; the views are free
        del first
        counter.phase = "b"
        third = torch.empty(300, dtype=torch.bfloat16, device="meta")  # 600 bytes, two grains
        assert counter.born_by_peak([third, product]) == 512 + 1024
        del product, third
    assert (counter.now, counter.peak, counter.flop) == (0, 512 + 1024, 2 * 16**3)
    assert counter.at_peak == {"a": 512, "b": 1024}


def gemma_12b(**kind: object) -> Model:
    model = build(named("gemma3-12b"), dtype=torch.bfloat16, device="meta")
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, Linear):
            model.model.layers.set_submodule(name, quantised(module.weight, "nf4"))
    return adapt(model, rank=64, alpha=64.0, targets=LINEARS, seed=0, dora=True, rslora=True, **kind)


def settings(**changes: object) -> FitSpec:
    values = {"max_steps": 1, "batch_tokens": 4096, "micro_tokens": 4096, "max_length": 4096, "checkpointing": "all"}
    return FitSpec.parse(values | {"optimizer": {"kind": "adamw8"}} | changes)


def test_the_promise_of_12b():
    """Gemma 3 12B, NF4, DoRA and rsLoRA of rank 64 on all seven linears, 4,096 tokens in one pass, fp32 adapters: 11.8 GB of tensors."""
    found = step_budget(gemma_12b(), settings(), device="cuda", layers=48)
    assert 11.0e9 < found.tensors <= 11.8e9
    assert 300e12 * 0.9 < found.flop < 300e12 * 1.1
    whole_logits = step_budget(gemma_12b(), settings(loss_chunk=4096), device="cuda", layers=48)
    assert whole_logits.tensors > 12.0e9, "the counter must see a loss that holds all logits"


def test_the_low_memory_preset_of_12b():
    low = settings(tile=1024, offload=True)
    found = step_budget(hold_embedding(gemma_12b(dtype=torch.bfloat16)), low, device="cuda", layers=48)
    assert found.tensors <= 9.5e9


@pytest.mark.parametrize("kind", ["full", "lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_meta_counts_what_a_real_step_takes(world, kind, dtype, layers):
    """The same program under the same counter, with and without numbers: the same bytes."""
    spec = world.spec(dtype=dtype, micro_tokens=256, batch_tokens=256, checkpointing="all", tile=64)
    model = world.model()
    if kind != "full":
        adapt(model, rank=4, alpha=8.0, targets=LINEARS, seed=0, dora=kind == "dora")
    prepare(model, spec)
    counted = step_budget(model, spec, device="cpu", layers=layers)
    real = counted_step(model, spec, device="cpu", layers=layers)
    for item in ("weights", "trained weights", "optimizer", "gradients"):
        assert counted.items[item] == real.items[item]
    assert counted.tensors == pytest.approx(real.tensors, rel=0.02)


@pytest.mark.parametrize("kind", ["adamw", "adamw8", "muon"])
def test_the_optimizers_bytes_are_those_of_its_state(world, kind):
    model = world.model()
    spec = world.spec(optimizer={"kind": kind}).optimizer
    trained = dict(model.named_parameters())
    optimizer = make_optimizer(trained, spec)
    for weight in trained.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step(1.0)
    held = sum(t.numel() * t.element_size() for t in optimizer.state().values() if t.ndim)
    assert optimizer_bytes(trained, spec) == pytest.approx(held, rel=0.01)


def test_a_twin_has_no_numbers_and_shares_what_is_shared(world):
    model = world.model()
    twin = meta_twin(model)
    assert all(weight.is_meta for weight in twin.parameters()) and twin.lm_head.weight is twin.model.embed_tokens.weight
    assert not any(weight.is_meta for weight in model.parameters())


def test_layers_are_computed_again_as_far_as_memory_asks(world):
    model, spec = world.model(), world.spec()
    assert layers_to_recompute(model, spec, free=1 << 40) == 0
    assert layers_to_recompute(model, spec, free=0) == 2
    needs = [budget.needed(step_budget(model, spec, device="cpu", layers=layers)) for layers in (0, 1, 2)]
    assert needs[0] > needs[1] > needs[2]
    found = layers_to_recompute(model, spec, free=needs[1])
    assert found >= 1 and needs[found] <= needs[1]
    assert layers_to_recompute(model, world.spec(checkpointing="off"), free=0) == 0


def test_the_ladder_is_walked_in_its_order():
    lean, seen = Lean(4096, 0, Thrift()), []
    while (found := lighter(lean, RUNGS, longest=1000, layers=4, device="cuda")) is not None:
        rung, lean = found
        seen.append(rung)
    assert seen == ["micro", "micro", "checkpointing", "tile", "tile", "tile", "offload"] and lean.micro_tokens == 1024
    assert lean == Lean(1024, 4, Thrift(tile=128, is_offloaded=True))
    assert lighter(Lean(64, 0, Thrift()), ("offload", "tile"), longest=64, layers=4, device="cuda") is None
    first = lighter(Lean(4096, 0, Thrift()), ("checkpointing", "micro"), longest=64, layers=4, device="cpu")
    assert first is not None and first[0] == "checkpointing"


class Card:
    """A device with room for so many bytes of a step: what is beyond fails as torch fails."""

    def __init__(self, monkeypatch, room):
        gradient, self.failures = loop._Trainer._gradient, 0

        def limited(trainer, step):
            if trainer._bytes(trainer.lean) > room(trainer):
                self.failures += 1
                torch.rand(3)  # numbers were drawn before it failed
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore words")
            return gradient(trainer, step)

        monkeypatch.setattr(loop._Trainer, "_gradient", limited)


def test_running_out_of_memory_changes_no_result(world, tmp_path, monkeypatch):
    """Room for no more than the leanest pass: the losses are those of the run that had all the memory it wanted."""
    rows, plain = world.rows(40), world.spec(max_steps=5, checkpointing="off")
    world.fit(tmp_path / "a", world.model(), rows, None, plain)
    plenty = world.losses()
    world.events.clear()
    card = Card(monkeypatch, lambda trainer: trainer._bytes(Lean(64, 2, Thrift())) + 100)
    world.fit(tmp_path / "b", world.model(), rows, None, plain)
    assert card.failures == 2 and world.losses() == pytest.approx(plenty, rel=1e-6)
    alarms = [event for event in world.events if event.get("alarm") == "oom"]
    assert [event["rung"] for event in alarms] == ["micro", "checkpointing"] and all(e["saved"] > 0 for e in alarms)


def test_what_was_drawn_before_memory_ran_out_is_drawn_again(world, tmp_path, monkeypatch):
    spec = world.spec(max_steps=3, checkpointing="off", on_oom=("checkpointing",))

    def model():
        return adapt(world.model(), rank=4, alpha=8, targets=("q_proj",), dropout=0.2, seed=0)

    world.fit(tmp_path / "a", model(), world.rows(40), None, spec)
    plenty = world.losses()
    Card(monkeypatch, lambda trainer: 0 if trainer.progress.step == 1 and not trainer.lean.layers else 1 << 60)
    world.fit(tmp_path / "b", model(), world.rows(40), None, spec)
    assert world.losses() == plenty and any(event.get("alarm") == "oom" for event in world.events)


def test_when_nothing_is_left_the_run_is_saved_and_says_so(world, tmp_path, monkeypatch):
    Card(monkeypatch, lambda trainer: 0 if trainer.progress.step == 3 else 1 << 60)
    with pytest.raises(OutOfMemory, match=r"step 4: out of memory .* nothing more to give up"):
        world.fit(tmp_path, world.model(), world.rows(40), None, world.spec(max_steps=6))
    monkeypatch.undo()
    done = world.fit(tmp_path, world.model(), world.rows(40), None, world.spec(max_steps=6))
    assert done.steps == 6 and sorted(world.losses()) == [1, 2, 3, 4, 5, 6]


def test_another_error_is_no_lack_of_memory():
    assert ladder.is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert ladder.is_out_of_memory(MemoryError()) and not ladder.is_out_of_memory(RuntimeError("shapes do not match"))


def test_what_only_a_gpu_can_do_is_refused_elsewhere(world, tmp_path):
    with pytest.raises(UserError, match="this is no GPU"):
        world.fit(tmp_path, world.model(), world.rows(10), None, world.spec(checkpointing="all", offload=True))
