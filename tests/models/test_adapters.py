"""Adapters against PEFT in both directions, merged against wrapped, W untouched, and what is refused."""

from dataclasses import replace

import pytest
import torch

from garage.core.errors import UserError
from garage.models.adapters import DoRA, LoRA, adapt, adapter_tensors, adapters_of, attach, load_adapter_tensors, merge
from garage.models.batch import pack
from garage.models.targets import spelled_out
from garage.models.weights import load_model
from garage.store.adapter import AdapterConfig, read_adapter, write_adapter

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "rsdora": {"rslora": True, "dora": True}}
TOKENS = torch.arange(1, 40)


def outputs(model):
    batch = pack([TOKENS.tolist()])
    return model.logits(model(batch.tokens_T, batch.positions_T, batch.attend()))


def shake(model, seed=0):
    """Random values in every trained tensor: B is not zero, magnitudes are not the row norms."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)


def config_of(kind, **more):
    return AdapterConfig(base="tiny", rank=4, alpha=6.0, targets=ALL, is_rslora="rs" in kind, is_dora="dora" in kind, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_reads_what_we_write(pair, kind, tmp_path):
    from peft import PeftModel
    from transformers import Qwen3ForCausalLM

    directory = pair("qwen3-tied").directory
    ours = adapt(load_model(directory), rank=4, alpha=6.0, targets=ALL, seed=1, **KINDS[kind])
    shake(ours)
    write_adapter(tmp_path, adapter_tensors(ours), config_of(kind))
    theirs = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(directory), tmp_path).eval()
    with torch.no_grad():
        expected = theirs(TOKENS[None]).logits[0]
        assert (outputs(ours) - expected).abs().max() < 1e-5
        assert (outputs(load_model(directory)) - expected).abs().max() > 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_peft_honours_our_patterns_and_presets(pair, kind, tmp_path):
    from peft import PeftModel
    from transformers import Gemma3ForCausalLM

    directory = pair("gemma3").directory
    patterns = {"rank_pattern": {"q_proj": 7, "layers.3.mlp.up_proj": 2}, "alpha_pattern": {"model.layers.1.self_attn.o_proj": 30.0}}
    ours = adapt(load_model(directory), rank=4, alpha=6.0, targets=["attention", "up_proj"], seed=1, **patterns, **KINDS[kind])
    shake(ours)
    targets = spelled_out(["attention", "up_proj"])
    for written, agrees in ((patterns, True), (patterns | {"alpha_pattern": {}}, False)):
        write_adapter(tmp_path, adapter_tensors(ours), replace(config_of(kind, **written), targets=targets))
        theirs = PeftModel.from_pretrained(Gemma3ForCausalLM.from_pretrained(directory), tmp_path).eval()
        with torch.no_grad():
            assert ((outputs(ours) - theirs(TOKENS[None]).logits[0]).abs().max() < 1e-5) == agrees
    assert len(targets) == 5 and sum(isinstance(module, LoRA) for module in ours.modules()) == 5 * 7


@pytest.mark.parametrize("targets", ["all-linear", "full names", r".*\.(q|k|v|o)_proj", ["q_proj", "k_proj", "v_proj", "o_proj"]])
def test_every_spelling_of_targets_gives_pefts_forward(pair, targets, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3ForCausalLM

    directory = pair("qwen3-tied").directory
    given = [f"model.layers.{i}.mlp.{part}_proj" for i in (0, 2) for part in ("up", "down")] if targets == "full names" else targets
    config = LoraConfig(r=4, lora_alpha=6, target_modules=given, task_type="CAUSAL_LM", use_dora=True, use_rslora=True)
    theirs = get_peft_model(Qwen3ForCausalLM.from_pretrained(directory), config)
    shake(theirs)
    theirs.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        assert (outputs(attach(load_model(directory), tmp_path)) - theirs(TOKENS[None]).logits[0]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_we_read_what_peft_writes(pair, kind, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import Gemma3ForCausalLM

    directory = pair("gemma3").directory
    patterns = {"rank_pattern": {"q_proj": 2, "layers.3.mlp.up_proj": 5}, "alpha_pattern": {"model.layers.1.self_attn.o_proj": 3}}
    kinds = {"use_rslora": "rs" in kind, "use_dora": "dora" in kind}
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **kinds, **patterns)
    theirs = get_peft_model(Gemma3ForCausalLM.from_pretrained(directory), config)
    shake(theirs)
    theirs.eval().save_pretrained(tmp_path)
    ours = attach(load_model(directory), tmp_path)
    with torch.no_grad():
        assert (outputs(ours) - theirs(TOKENS[None]).logits[0]).abs().max() < 1e-5
    assert ours.model.layers[0].self_attn.q_proj.lora_A.shape[0] == 2 and ours.model.layers[3].mlp.up_proj.lora_A.shape[0] == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [False, True])
def test_gradients_are_pefts(pair, kind, train, tmp_path):
    """Same loss, same gradients of A, B and the magnitudes, in the training and the evaluation form."""
    from peft import PeftModel
    from transformers import Qwen3ForCausalLM

    directory = pair("qwen3-tied").directory
    ours = adapt(load_model(directory), rank=4, alpha=6.0, targets=ALL, seed=1, **KINDS[kind]).train(train)
    shake(ours)
    write_adapter(tmp_path, adapter_tensors(ours), config_of(kind))
    theirs = PeftModel.from_pretrained(Qwen3ForCausalLM.from_pretrained(directory), tmp_path, is_trainable=True).train(train)
    outputs(ours).square().mean().backward()
    theirs(TOKENS[None]).logits.square().mean().backward()
    expected = {name.replace(".default", "").removesuffix(".weight"): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    trained = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert len(trained) == len(expected) == 3 * 7 * (3 if "dora" in kind else 2)
    for name, parameter in trained.items():
        assert (parameter.grad - expected[f"base_model.model.{name}"]).abs().max() < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_new_adapter_changes_nothing_and_merged_is_wrapped(fresh, kind):
    model = fresh("gemma3")
    with torch.no_grad():
        before = outputs(model)
        adapt(model, rank=3, alpha=9.0, targets=ALL, seed=0, **KINDS[kind])
        assert (outputs(model) - before).abs().max() < 1e-12
        shake(model)
        wrapped = outputs(model)
        assert (outputs(merge(model)) - wrapped).abs().max() < 1e-11
    assert (wrapped - before).abs().max() > 0.1
    assert not any(isinstance(module, LoRA) for module in model.modules())


def test_base_is_frozen_and_bit_identical_under_bf16(fresh):
    """Training steps on a bf16 base with fp32 adapters: W never gets a gradient nor changes; A's first gradient is exactly zero."""
    model = fresh("gemma3", torch.bfloat16)
    base = {name: p.clone() for name, p in model.named_parameters()}
    adapt(model, rank=4, alpha=8.0, targets=ALL, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32} and len(trained) == 7 * 7 * 2
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        outputs(model).float().square().mean().backward()
        lora = model.model.layers[2].mlp.up_proj
        assert (step == 0) == (not lora.lora_A.grad.any()) and lora.lora_B.grad.any()
        optimizer.step()
    left = {name.replace(".base.", "."): p for name, p in model.named_parameters() if not p.requires_grad}
    assert left.keys() == base.keys() and all(torch.equal(left[name], base[name]) and left[name].grad is None for name in base)


def test_bf16_gradients_follow_float64(fresh):
    """With a bf16 base and fp32 adapters, gradients agree with the float64 twin to bf16 rounding."""
    grads = []
    for dtype in (torch.float64, torch.bfloat16):
        model = fresh("qwen3", torch.bfloat16, num_hidden_layers=1).to(dtype)
        adapt(model, rank=4, alpha=8.0, targets=ALL, seed=0, dora=True)
        shake(model)
        outputs(model).square().mean().backward()
        grads.append(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.999


def test_row_norms_follow_a(fresh):
    """n is never stale: after A changes, the forward equals the merged matrix."""
    model = adapt(fresh("qwen3"), rank=3, alpha=6.0, targets=["up_proj"], seed=0, dora=True)
    shake(model)
    lora = model.model.layers[0].mlp.up_proj
    x = torch.randn(5, 48, dtype=torch.float64)
    with torch.no_grad():
        lora(x)
        lora.lora_A.data.mul_(3.0)
        assert (lora(x) - x @ lora.merged().T).abs().max() < 1e-12
        full = lora.base.weight + lora.scale * lora.lora_B @ lora.lora_A
        expected = full * (lora.lora_magnitude_vector / full.norm(dim=1))[:, None]
        assert (lora.merged() - expected).abs().max() < 1e-12
        assert (super(DoRA, lora).merged() - expected).abs().max() > 0.01


@pytest.mark.parametrize("dora", [False, True])
def test_dropout(fresh, dora):
    """Off in evaluation; in training its mean over many draws is the evaluation output."""
    lora = adapt(fresh("qwen3"), rank=4, alpha=8.0, targets=["up_proj"], seed=0, dropout=0.5, dora=dora).model.layers[0].mlp.up_proj
    shake(lora)
    x = torch.randn(4, 48, dtype=torch.float64)
    with torch.no_grad():
        exact = lora.eval()(x)
        assert torch.equal(exact, lora(x))
        torch.manual_seed(0)
        drawn = torch.stack([lora.train()(x) for _ in range(4000)])
    assert drawn.std(0).mean() > 0.05
    assert (drawn.mean(0) - exact).abs().max() < 6 * drawn.std(0).max() / 4000**0.5


def test_seeds_are_per_module(fresh):
    """Another set of targets does not change the draw of a module; another seed does. Bounds are those of Kaiming."""
    some = adapt(fresh("qwen3"), rank=4, alpha=8.0, targets=["up_proj"], seed=5)
    every = adapt(fresh("qwen3"), rank=4, alpha=8.0, targets=ALL, seed=5)
    other = adapt(fresh("qwen3"), rank=4, alpha=8.0, targets=ALL, seed=6)
    first, second, third = (model.model.layers[1].mlp.up_proj.lora_A for model in (some, every, other))
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert 0.9 * 48**-0.5 < first.abs().max() <= 48**-0.5


def test_targets_must_match(fresh):
    for target in ("nothing", "lm_head", "proj", "embed_tokens"):
        with pytest.raises(UserError, match=target):
            adapt(fresh("qwen3"), rank=4, alpha=8.0, targets=["q_proj", target], seed=0)


def test_presets_and_names(fresh):
    adapted = lambda *targets: {n for n, _ in adapters_of(adapt(fresh("qwen3"), rank=2, alpha=8.0, targets=targets, seed=0))}  # noqa: E731
    assert adapted("all-linear") == adapted(*ALL) and len(adapted("all-linear")) == 21
    assert adapted("attention", "mlp") == adapted(*ALL) and adapted("qv") == adapted("q_proj", "v_proj")
    assert adapted("model.layers.1.mlp.up_proj", "2.mlp.up_proj") == {f"model.layers.{i}.mlp.up_proj" for i in (1, 2)}
    with pytest.raises(UserError) as caught:
        adapted("all_linear")
    assert "all-linear, attention, mlp, qv" in caught.value.remedy


def test_patterns_and_ranks_must_fit(fresh):
    settings = {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "up_proj"], "seed": 0}
    for pattern in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(UserError, match=f"{pattern}: 'v_proj' names no adapted module"):
            adapt(fresh("qwen3"), **settings, **{pattern: {"q_proj": 2, "v_proj": 2}})
    model = fresh("qwen3")
    with pytest.raises(UserError, match=r"rank 49 is larger .* model\.layers\.2\.mlp\.up_proj, 48"):
        adapt(model, **settings, rank_pattern={"layers.2.mlp.up_proj": 49})
    assert not list(adapters_of(model)), "nothing was wrapped"
    model = adapt(model, **settings, rank_pattern={"layers.2.mlp.up_proj": 48}, alpha_pattern={"q_proj": 2.0})
    assert {(len(lora.lora_A), lora.scale) for _, lora in adapters_of(model)} == {(4, 0.5), (4, 2.0), (48, 8 / 48)}


def test_tensors_must_fit(fresh, tmp_path):
    model = adapt(fresh("qwen3"), rank=4, alpha=8.0, targets=["q_proj"], seed=0)
    tensors = {name: tensor.float() for name, tensor in adapter_tensors(model).items()}
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
    missing, left_over = {k: v for k, v in tensors.items() if k != name}, {**tensors, name + "x": tensors[name]}
    for damaged in ({**tensors, name: tensors[name][:-1]}, missing, left_over):
        with pytest.raises(UserError, match=name):
            load_adapter_tensors(model, damaged)
    config = AdapterConfig(base="tiny", rank=4, alpha=8.0, targets=("q_proj",))
    write_adapter(tmp_path, {k.replace("q_proj", "z_proj"): v for k, v in tensors.items()}, config)
    with pytest.raises(UserError, match="z_proj"):
        attach(fresh("qwen3"), tmp_path)
    write_adapter(tmp_path, tensors, AdapterConfig(base="tiny", rank=8, alpha=8.0, targets=("q_proj",)))
    with pytest.raises(UserError, match="rank"):
        attach(fresh("qwen3"), tmp_path)
    write_adapter(tmp_path, tensors, config)
    assert read_adapter(tmp_path)[0] == config
    assert torch.equal(outputs(attach(fresh("qwen3", torch.float32), tmp_path)), outputs(model.float()))
