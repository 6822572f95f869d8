from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file
from torch import Tensor

from lit_align.attention import BY_GROUP
from lit_align.batch import CompletionBatch, Sampling
from lit_align.errors import UserError
from lit_align.layout import Rows, attention_mask, tree_rows
from lit_align.pair import PolicyReferencePair
from lit_align.settings import LoraSettings, PairSettings
from tests.families import FAMILIES, ragged_batch, save_tiny, tiny


def disturbed(pair: PolicyReferencePair, seed: int = 3) -> PolicyReferencePair:
    """Give the adapter random weights, so that policy and reference differ."""
    torch.manual_seed(seed)
    for parameter in pair.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, 0.0, 0.1)
    return pair


def plain_logps(
    model: torch.nn.Module, batch: CompletionBatch, temperature: float = 1.0
) -> dict[tuple[int, int], Tensor]:
    """Token log-probs of each completion by the model's own forward: one unpadded row each, full logits."""
    found = {}
    for b in range(len(batch.row)):
        prompt = batch.prompt_ids[b][batch.prompt_mask[b]]
        for k in range(batch.present.shape[1]):
            if batch.present[b, k]:
                completion = batch.completion_ids[b, k][batch.completion_mask[b, k]]
                logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
                logps = (logits.float() / temperature).log_softmax(-1)
                found[b, k] = logps.gather(1, completion[:, None])[:, 0]
    return found


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_tree_rows_equal_the_models_own_forward_in_values_and_gradients(family: str, tmp_path: Path) -> None:
    pair = disturbed(PolicyReferencePair(PairSettings(save_tiny(family, tmp_path), temperature=0.8)))
    assert pair.trees
    batch = ragged_batch()
    weight = torch.randn(batch.completion_mask.shape, generator=torch.Generator().manual_seed(5))

    scores = pair.score(batch)
    (scores.token_logps * weight).sum().backward()
    gradient = {name: p.grad.clone() for name, p in pair.named_parameters() if p.grad is not None}
    assert gradient
    pair.zero_grad()
    expected = plain_logps(pair.policy, batch, 0.8)
    torch.stack([(logps * weight[at][: len(logps)]).sum() for at, logps in expected.items()]).sum().backward()

    for at, logps in expected.items():
        torch.testing.assert_close(scores.token_logps[at][: len(logps)], logps, atol=2e-5, rtol=1e-5)
    for name, parameter in pair.named_parameters():
        if name in gradient:
            torch.testing.assert_close(gradient[name], parameter.grad, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("trees", [True, False])
def test_final_hidden_is_the_models_own_at_the_last_token(name: str, trees: bool, tmp_path: Path) -> None:
    """One unpadded row per completion through the model's own forward, in values and gradients; 0 where absent."""
    pair = disturbed(PolicyReferencePair(PairSettings(save_tiny(name, tmp_path))))
    pair.trees = trees
    batch = ragged_batch()
    found = pair.final_hidden(batch)
    assert found.shape == (4, 3, 32)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(5))
    (found * weight).sum().backward()
    gradient = {name: p.grad.clone() for name, p in pair.named_parameters() if p.grad is not None}
    assert gradient.keys() == set(pair.state_names())
    pair.zero_grad()
    expected = torch.zeros_like(found)
    for b, k in batch.present.nonzero().tolist():
        prompt = batch.prompt_ids[b][batch.prompt_mask[b]]
        ids = torch.cat([prompt, batch.completion_ids[b, k][batch.completion_mask[b, k]]])
        expected[b, k] = pair.policy(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0, -1]
    (expected * weight).sum().backward()
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert (found[~batch.present] == 0).all()
    for name, parameter in pair.named_parameters():
        if name in gradient:
            assert parameter.grad is not None
            assert (gradient[name] - parameter.grad).abs().max() <= 1e-4 * parameter.grad.abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("trees", [True, False])
def test_values_are_read_where_each_token_is_predicted(name: str, trees: bool, tmp_path: Path) -> None:
    """From the model's own states before each token, one unpadded row each, in values and gradients; 0 at padding."""
    pair = disturbed(PolicyReferencePair(PairSettings(save_tiny(name, tmp_path))))
    pair.trees = trees
    batch = ragged_batch()
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(32, generator=generator)
    weight = torch.randn(batch.completion_mask.shape, generator=generator)
    found = pair.score(batch, value_head=lambda hidden: hidden @ direction).values
    assert found is not None
    (found * weight).sum().backward()
    gradient = {name: p.grad.clone() for name, p in pair.named_parameters() if p.grad is not None}
    assert gradient.keys() == set(pair.state_names())
    pair.zero_grad()
    expected = torch.zeros_like(found)
    for b, k in batch.present.nonzero().tolist():
        prompt = batch.prompt_ids[b][batch.prompt_mask[b]]
        completion = batch.completion_ids[b, k][batch.completion_mask[b, k]]
        states = pair.policy(input_ids=torch.cat([prompt, completion])[None], output_hidden_states=True)
        expected[b, k, : len(completion)] = states.hidden_states[-1][0, len(prompt) - 1 : -1] @ direction
    (expected * weight).sum().backward()
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    for name, parameter in pair.named_parameters():
        if name in gradient:
            assert parameter.grad is not None
            assert (gradient[name] - parameter.grad).abs().max() <= 1e-4 * parameter.grad.abs().max()
    assert pair.score(batch).values is None


def test_the_reference_is_the_untouched_base(family: str, tmp_path: Path) -> None:
    pair = disturbed(PolicyReferencePair(PairSettings(save_tiny(family, tmp_path))))
    batch = ragged_batch()
    scores = pair.score(batch)
    assert scores.reference_token_logps is not None
    for at, logps in plain_logps(tiny(family), batch).items():
        torch.testing.assert_close(scores.reference_token_logps[at][: len(logps)], logps, atol=2e-5, rtol=1e-5)
    assert (scores.logratio.abs() > 1e-3)[batch.present].all()
    assert not scores.reference_token_logps.requires_grad


def test_policy_and_reference_agree_exactly_at_the_start(family: str, tmp_path: Path) -> None:
    pair = PolicyReferencePair(PairSettings(save_tiny(family, tmp_path)))
    scores = pair.score(ragged_batch(), epsilon=0.3, kl=True)
    assert scores.reference_token_logps is not None
    assert scores.perturbed is not None
    assert torch.equal(scores.token_logps, scores.reference_token_logps)
    assert torch.equal(scores.token_logps, scores.perturbed.outward)
    assert torch.equal(scores.token_logps, scores.perturbed.inward)
    assert scores.token_kl is not None
    assert scores.token_kl.abs().max() == 0


@pytest.mark.parametrize("rows", [0, 1, 2, 4])
def test_one_row_per_completion_gives_the_same_scores_and_gradients(
    family: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each group attending apart; and with masks of whole rows, all in one, two in each, each in its own."""
    pair = disturbed(PolicyReferencePair(PairSettings(save_tiny(family, tmp_path))))
    batch, found = ragged_batch(), []
    if rows:
        if pair.base.config._attn_implementation == BY_GROUP:
            pair.base.set_attn_implementation("sdpa")
        monkeypatch.setattr("lit_align.layout.ATTENTION_WIDTH", {1: 1e6, 2: 4, 4: 1e-6}[rows])
        assert len(tree_rows(batch, 32).input_ids) == rows
    for pair.trees in (True, False):
        pair.zero_grad()
        scores = pair.score(batch, kl=True, entropy=True)
        scores.logps.sum().backward()
        found.append((scores, {name: p.grad.clone() for name, p in pair.named_parameters() if p.grad is not None}))
    (trees, gradient), (separate, expected) = found
    for name in ("token_logps", "reference_token_logps", "token_kl", "entropy"):
        torch.testing.assert_close(getattr(trees, name), getattr(separate, name), atol=1e-5, rtol=1e-5)
    assert gradient.keys() == expected.keys() != set()
    for name, value in expected.items():
        assert (gradient[name] - value).abs().max() <= 1e-5 * max(1, value.abs().max())


@pytest.mark.parametrize(("name", "masks"), [("llama", 4), ("gemma2", 2)])
def test_the_masks_are_built_once_for_both_models(
    name: str, masks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each kind of layer, whatever the number of layers; or for each group where groups attend apart."""
    pair = PolicyReferencePair(PairSettings(save_tiny(name, tmp_path)))
    built: list[int | None] = []

    def count(rows: Rows, window: int | None = None) -> Tensor:
        built.append(window)
        return attention_mask(rows, window)

    monkeypatch.setattr("lit_align.layout.attention_mask", count)
    pair.score(ragged_batch(), kl=True)
    assert len(built) == masks


def test_a_family_without_proof_falls_back_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("bloom", vocab_size=61, hidden_size=32, n_layer=2, n_head=4)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    pair = disturbed(PolicyReferencePair(PairSettings(str(tmp_path))))
    assert not pair.trees
    assert "bloom" in caplog.text
    batch = ragged_batch()
    scores = pair.score(batch)
    for at, logps in plain_logps(pair.policy, batch).items():
        torch.testing.assert_close(scores.token_logps[at][: len(logps)], logps, atol=2e-5, rtol=1e-5)


def test_a_model_whose_logits_are_bent_in_a_way_its_config_does_not_tell_is_refused(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = AutoConfig.for_model(
        "hyperclovax", num_attention_heads=4, num_key_value_heads=2, logits_scaling=3.0, **sizes
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot score HyperCLOVAX"):
        PolicyReferencePair(PairSettings(str(tmp_path)))


def test_dropout_of_an_adapter_to_start_from_is_off(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "base")
    disturbed(PolicyReferencePair(PairSettings(model))).save_adapter(tmp_path / "sft")
    config = tmp_path / "sft" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_dropout": 0.0', '"lora_dropout": 0.3'))
    lora = LoraSettings(adapter=str(tmp_path / "sft"))
    scores = PolicyReferencePair(PairSettings(model, lora=lora, gradient_checkpointing=True)).score(ragged_batch())
    assert torch.equal(scores.token_logps, scores.reference_token_logps)


def test_padding_order_and_split_change_nothing(tmp_path: Path) -> None:
    pair = disturbed(PolicyReferencePair(PairSettings(save_tiny("qwen3", tmp_path))))
    batch = ragged_batch()
    whole = pair.score(batch, kl=True)
    order = torch.tensor([2, 0, 3, 1])
    permuted = pair.score(batch.rows(order), kl=True)
    wider = batch._replace(
        prompt_ids=torch.nn.functional.pad(batch.prompt_ids, (4, 3), value=7),
        prompt_mask=torch.nn.functional.pad(batch.prompt_mask, (4, 3)),
        completion_ids=torch.nn.functional.pad(batch.completion_ids, (2, 5), value=9),
        completion_mask=torch.nn.functional.pad(batch.completion_mask, (2, 5)),
    )
    padded = pair.score(wider, kl=True)
    alone = [pair.score(batch.rows(slice(b, b + 1)), kl=True) for b in range(4)]
    for name in ("logps", "logratio"):
        expected = getattr(whole, name)
        torch.testing.assert_close(getattr(permuted, name), expected[order], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(getattr(padded, name), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.cat([getattr(s, name) for s in alone]), expected, atol=1e-5, rtol=1e-5)


def test_an_sft_adapter_is_start_and_reference(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "base")
    first = disturbed(PolicyReferencePair(PairSettings(model)))
    first.save_adapter(tmp_path / "sft")
    pair = PolicyReferencePair(PairSettings(model, lora=LoraSettings(adapter=str(tmp_path / "sft"))))
    batch = ragged_batch()
    start = pair.score(batch)
    torch.testing.assert_close(start.token_logps, first.score(batch).token_logps)
    assert torch.equal(start.token_logps, start.reference_token_logps)
    before = start.reference_token_logps
    start.token_logps.sum().backward()
    trained = [p for p in pair.parameters() if p.requires_grad]
    assert len(trained) == len(pair.state_names()) == len(first.state_names())
    assert all(p.grad is not None for p in trained)
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05)
    after = pair.score(batch)
    assert torch.equal(after.reference_token_logps, before)
    assert not torch.equal(after.token_logps, before)


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("adapter", [False, True])
def test_a_reference_that_moved_has_left_its_start_behind(tmp_path: Path, adapter: bool, averaged: bool) -> None:
    model = save_tiny("llama", tmp_path / "base")
    disturbed(PolicyReferencePair(PairSettings(model))).save_adapter(tmp_path / "sft")
    lora = LoraSettings(adapter=str(tmp_path / "sft") if adapter else None)
    pair, batch = PolicyReferencePair(PairSettings(model, lora=lora)), ragged_batch()
    start = pair.score(batch).reference_token_logps
    pair.let_reference_move(averaged)
    trained = [name for name, parameter in pair.named_parameters() if parameter.requires_grad]
    disturbed(pair, seed=4).update_reference(1.0)
    moved = pair.score(batch)
    torch.testing.assert_close(moved.reference_token_logps, moved.token_logps)
    with pair.from_the_start():
        torch.testing.assert_close(pair.score(batch).reference_token_logps, start)
    assert (moved.token_logps - start).abs().max() > 0.01
    assert torch.equal(pair.score(batch).reference_token_logps, moved.reference_token_logps)
    assert [name for name, parameter in pair.named_parameters() if parameter.requires_grad] == trained


def test_the_saved_adapter_gives_equal_logits_in_plain_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    lora = LoraSettings(r=4)  # at full rank the order of summation is another one
    pair = disturbed(PolicyReferencePair(PairSettings(save_tiny("llama", tmp_path / "base"), lora=lora)))
    pair.save_adapter(tmp_path / "adapter")
    assert load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter").eval()
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loaded(input_ids=ids).logits, pair.policy(input_ids=ids).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_trains_and_is_its_own_reference(tmp_path: Path, quantization: str) -> None:
    model = save_tiny("llama", tmp_path, hidden_size=64, intermediate_size=128)  # bitsandbytes' blocks hold 64 weights
    settings = PairSettings(model, quantization=quantization, dtype="float32")  # type: ignore[arg-type]
    pair = PolicyReferencePair(settings)
    batch = ragged_batch()
    start = pair.score(batch)
    assert torch.equal(start.token_logps, start.reference_token_logps)
    start.token_logps.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pair.parameters() if p.requires_grad)
    full = PolicyReferencePair(PairSettings(str(tmp_path))).score(batch)
    assert not torch.equal(full.token_logps, start.token_logps)


def test_gradients_through_nf4_are_those_of_the_dequantized_model(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path, hidden_size=64, intermediate_size=128)
    batch = ragged_batch()
    pair = disturbed(PolicyReferencePair(PairSettings(model, quantization="nf4", dtype="float32")))
    for _ in range(2):  # a first pass without gradient must not change what the second one computes
        pair.zero_grad()
        pair.score(batch).logratio.sum().backward()
    plain = disturbed(PolicyReferencePair(PairSettings(model)))
    weights = dict(plain.base.named_parameters())
    for name, module in pair.base.named_modules():
        if f"{name}.weight" in weights and hasattr(module.weight, "quant_state"):
            state = module.weight.quant_state
            weights[f"{name}.weight"].data = dequantize_4bit(module.weight.data, state).to(torch.float32)
    scores = plain.score(batch)
    scores.logratio.sum().backward()
    torch.testing.assert_close(pair.score(batch).token_logps, scores.token_logps, atol=1e-4, rtol=1e-4)
    for (name, p), (_, q) in zip(pair.named_parameters(), plain.named_parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, atol=1e-3, rtol=1e-3, msg=name)


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    model, batch, gradients = save_tiny("llama", tmp_path), ragged_batch(), []
    for checkpointing in (False, True):
        pair = disturbed(PolicyReferencePair(PairSettings(model, gradient_checkpointing=checkpointing)))
        pair.score(batch).logratio.sum().backward()
        gradients.append([p.grad for p in pair.parameters() if p.requires_grad])
    assert gradients[0]
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_samples_are_scored_as_they_were_drawn(family: str, tmp_path: Path) -> None:
    """Nearly greedy sampling must follow the scorer's own most likely token at every step."""
    pair = disturbed(PolicyReferencePair(PairSettings(save_tiny(family, tmp_path))))
    prompts = ragged_batch()
    drawn = pair.generate(prompts, 2, Sampling(max_new_tokens=10, temperature=1e-4)).completions
    assert torch.equal(drawn.prompt_ids, prompts.prompt_ids)
    assert torch.equal(drawn.completion_ids[:, 0], drawn.completion_ids[:, 1])
    for b, k in plain_logps(pair.policy, drawn):
        prompt = prompts.prompt_ids[b][prompts.prompt_mask[b]]
        completion = drawn.completion_ids[b, k][drawn.completion_mask[b, k]]
        logits = pair.policy(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
        assert torch.equal(logits.argmax(-1), completion)


def test_generation_ends_at_the_end_of_sequence_and_is_seeded(tmp_path: Path) -> None:
    pair = PolicyReferencePair(PairSettings(save_tiny("llama", tmp_path)))
    prompts = ragged_batch()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first, again, other = (
        pair.generate(prompts, 16, Sampling(24, temperature=3.0, seed=seed)).completions for seed in (4, 4, 5)
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert not torch.equal(first.completion_ids[..., :3], other.completion_ids[..., :3])
    eos = (first.completion_ids == 2) & first.completion_mask
    assert eos.sum() > 0
    assert (eos.sum(-1) <= 1).all()
    last = first.completion_ids.gather(2, first.lengths[..., None] - 1)[..., 0]
    assert ((last == 2) == eos.any(-1)).all()
    assert (first.lengths[~eos.any(-1)] == 24).all()


def test_the_reference_can_generate(tmp_path: Path) -> None:
    pair = PolicyReferencePair(PairSettings(save_tiny("llama", tmp_path)))
    prompts = ragged_batch()
    start = pair.generate(prompts, 4, Sampling(8)).completions
    disturbed(pair)
    again = pair.generate(prompts, 4, Sampling(8), reference=True).completions
    assert torch.equal(again.completion_ids, start.completion_ids)
    assert not torch.equal(pair.generate(prompts, 4, Sampling(8)).completions.completion_ids, start.completion_ids)


def test_what_cannot_be_used_is_refused_with_the_remedy(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "base")
    with pytest.raises(UserError, match=r"no_such_layer.*q_proj"):
        PolicyReferencePair(PairSettings(model, lora=LoraSettings(target_modules=["no_such_layer"])))
    with pytest.raises(UserError, match=r"lm_head"):
        PolicyReferencePair(PairSettings(model, lora=LoraSettings(target_modules=["q_proj", "lm_head"])))
    with pytest.raises(UserError, match=r"there is no folder"):
        PolicyReferencePair(PairSettings(str(tmp_path / "absent")))
    with pytest.raises(UserError, match=r"somebody/absent.*Hub"):
        PolicyReferencePair(PairSettings("somebody/absent"))
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").touch()
    with pytest.raises(UserError, match=r"safetensors"):
        PolicyReferencePair(PairSettings(model, lora=LoraSettings(adapter=str(tmp_path / "pickled"))))
    with pytest.raises(UserError, match=r"temperature is 0"):
        PairSettings(temperature=0)
    with pytest.raises(UserError, match=r"revision"):
        PairSettings(trust_remote_code=True)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    save_tiny("llama", model)
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"Give a folder with safetensors weights"):
        PolicyReferencePair(PairSettings(str(model)))


def test_a_completion_has_ended_if_its_last_token_is_an_end_of_sequence(tmp_path: Path) -> None:
    pair = PolicyReferencePair(PairSettings(save_tiny("llama", tmp_path)), eos_token_id=5)
    batch = ragged_batch()
    ids = batch.completion_ids.masked_fill(batch.completion_ids == 5, 6)
    last = batch.lengths - 1
    ids[0, 0, 0] = 5  # in the middle, which no draw gives
    ids[1, 0, last[1, 0]] = 5
    ids[2, 2] = 5  # absent
    expected = torch.zeros(4, 3, dtype=torch.bool)
    expected[1, 0] = True
    ended = pair.ended(batch._replace(completion_ids=ids))
    assert torch.equal(ended, expected)
