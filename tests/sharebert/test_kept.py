"""Generated matrices are made once in evaluation, and anew after every change that can be noticed."""

from __future__ import annotations

import copy
import io
import pickle
import threading

import pytest
import torch
from tiny_models import tiny_model

from sharebert import ShareBertForMaskedLM, virtual

TOKENS = torch.randint(5, 250, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many matrices each call of `generate` made."""
    counts: list[int] = []
    original = virtual.generate

    def counted(cut: object, *rest: object) -> object:
        matrices = original(cut, *rest)  # type: ignore[arg-type]
        counts.append(len(matrices))
        return matrices

    monkeypatch.setattr("sharebert.sharing.generate", counted)
    return counts


def fresh(model: ShareBertForMaskedLM, **kwargs: object) -> torch.Tensor:
    """Hidden states of a model that has kept nothing."""
    return copy.deepcopy(model).sharebert(TOKENS, **kwargs).hidden


PRUNED = {"kept_heads": [0, 2], "kept_columns": list(range(3, 40, 2))}
"""Keys of a model with some of its heads and columns, and factors on their outputs."""


@pytest.fixture(params=["veps", "eps", "pruned"])
def model(request: pytest.FixtureRequest) -> ShareBertForMaskedLM:
    return tiny_model(**PRUNED if request.param == "pruned" else {"sharing": request.param}).eval()


@torch.no_grad()
def test_made_once_and_the_pooler_when_it_is_asked_for(model: ShareBertForMaskedLM, made: list[int]) -> None:
    first = model.sharebert(TOKENS, pool=False)
    second = model.sharebert(TOKENS)
    third = model.sharebert(TOKENS, pool=False)
    assert made == [6, 1]
    assert torch.equal(first.hidden, second.hidden)
    assert torch.equal(first.hidden, third.hidden)
    assert third.pooled is None
    assert torch.equal(second.pooled, copy.deepcopy(model).sharebert(TOKENS).pooled)


def edit_in_place(model: ShareBertForMaskedLM) -> None:
    model.sharebert.word_embeddings.weight[7].mul_(2)


def edit_in_inference_mode(model: ShareBertForMaskedLM) -> None:
    with torch.inference_mode():
        model.sharebert.word_embeddings.weight.mul_(1.5)


def edit_a_view(model: ShareBertForMaskedLM) -> None:
    model.sharebert.word_embeddings.weight.view(-1).add_(0.1)


def new_data(model: ShareBertForMaskedLM) -> None:
    weight = model.sharebert.word_embeddings.weight
    weight.data = weight.data * 2


def new_data_often(model: ShareBertForMaskedLM) -> None:
    """The allocator may give freed memory again: the same address then holds other values."""
    weight = model.sharebert.word_embeddings.weight
    for factor in (3.0, 0.25, 2.0):
        weight.data = weight.data * factor


def new_parameter(model: ShareBertForMaskedLM) -> None:
    embedding = model.sharebert.word_embeddings
    for factor in (2.0, 0.5, 4.0):
        embedding.weight = torch.nn.Parameter(embedding.weight * factor)


def load(model: ShareBertForMaskedLM) -> None:
    model.load_state_dict({name: tensor * 1.1 for name, tensor in model.state_dict().items()})


def load_assigned(model: ShareBertForMaskedLM) -> None:
    model.load_state_dict({name: tensor * 1.1 for name, tensor in model.state_dict().items()}, assign=True)


def optimizer_step(model: ShareBertForMaskedLM) -> None:
    with torch.enable_grad():
        model.sharebert(TOKENS).hidden.square().sum().backward()
    torch.optim.AdamW(model.parameters(), lr=0.1).step()


EDITS = [
    edit_in_place,
    edit_in_inference_mode,
    edit_a_view,
    new_data,
    new_data_often,
    new_parameter,
    load,
    load_assigned,
    optimizer_step,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@torch.no_grad()
def test_every_change_is_noticed(model: ShareBertForMaskedLM, edit: object) -> None:
    before = model.sharebert(TOKENS).hidden
    edit(model)  # type: ignore[operator]
    after = model.sharebert(TOKENS).hidden
    assert not torch.allclose(before, after)
    assert torch.equal(after, fresh(model))


@torch.no_grad()
def test_a_change_of_the_projection_is_noticed() -> None:
    model = tiny_model(sharing="veps").eval()
    for parameter in model.sharebert.factor_linear_all.parameters():
        before = model.sharebert(TOKENS).hidden
        parameter.add_(0.3)
        after = model.sharebert(TOKENS).hidden
        assert not torch.allclose(before, after)
        assert torch.equal(after, fresh(model))


@pytest.mark.parametrize("name", ["kept_attention_scale", "kept_inner_scale"])
@torch.no_grad()
def test_a_change_of_a_factor_on_what_was_kept_is_noticed(name: str, made: list[int]) -> None:
    model = tiny_model(**PRUNED).eval()
    before = model.sharebert(TOKENS).hidden
    model.sharebert.get_parameter(name)[1] += 2
    after = model.sharebert(TOKENS).hidden
    assert not torch.allclose(before, after)
    assert torch.equal(after, model.sharebert(TOKENS).hidden)
    assert made == [7, 7]
    assert torch.equal(after, fresh(model))


@torch.no_grad()
def test_a_write_that_is_not_noticed_needs_a_call(model: ShareBertForMaskedLM) -> None:
    """The documented limit: if this fails because PyTorch counts such writes now, the documentation can go."""
    before = model.sharebert(TOKENS).hidden
    model.sharebert.word_embeddings.weight.data.mul_(2)
    model.sharebert.forget_weights()
    after = model.sharebert(TOKENS).hidden
    assert not torch.allclose(before, after)
    assert torch.equal(after, fresh(model))


def test_training_keeps_nothing(model: ShareBertForMaskedLM, made: list[int]) -> None:
    with torch.no_grad():
        model.sharebert(TOKENS)
        model.train()
        assert model.sharebert.sharing.kept._entry is None
        model.sharebert(TOKENS)
        assert made == [7, 7]
        model.eval()
        model.sharebert(TOKENS)
    model.sharebert(TOKENS).hidden.sum().backward()  # evaluation mode, but a gradient is needed
    assert made == [7, 7, 7, 7]
    assert model.sharebert.sharing.kept._entry is None
    assert model.sharebert.word_embeddings.weight.grad.abs().max() > 0


def test_a_frozen_encoder_keeps_them_and_other_parameters_get_gradients(
    model: ShareBertForMaskedLM, made: list[int]
) -> None:
    with torch.inference_mode():
        model.sharebert(TOKENS)
    model.requires_grad_(False)
    model.sharebert.final_norm.requires_grad_(True)
    model.sharebert.layers[0].query_bias.requires_grad_(True)
    model.sharebert(TOKENS).hidden.square().sum().backward()
    assert made == [7]
    kept = model.sharebert.layers[0].query_bias.grad.clone()
    model.zero_grad()
    model.sharebert.forget_weights()
    model.sharebert(TOKENS).hidden.square().sum().backward()
    assert torch.equal(model.sharebert.layers[0].query_bias.grad, kept)


@torch.no_grad()
def test_copies_and_pickles_are_empty(model: ShareBertForMaskedLM) -> None:
    size = len(pickle.dumps(model))
    expected = model.sharebert(TOKENS).hidden
    assert len(pickle.dumps(model)) == size
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)):
        assert other.sharebert.sharing.kept._entry is None
        assert torch.equal(other.sharebert(TOKENS).hidden, expected)
        other.sharebert.word_embeddings.weight.mul_(2)
        assert not torch.equal(other.sharebert(TOKENS).hidden, expected)
    assert torch.equal(model.sharebert(TOKENS).hidden, expected)


@torch.no_grad()
def test_moves_and_dtypes(model: ShareBertForMaskedLM, made: list[int]) -> None:
    model.sharebert(TOKENS)
    for move in (
        model.half,
        model.bfloat16,
        model.double,
        model.float,
        lambda: model.to("meta").to_empty(device="cpu"),
    ):
        move()
        assert model.sharebert.sharing.kept._entry is None
        assert model.sharebert(TOKENS).hidden.dtype == model.sharebert.word_embeddings.weight.dtype
    assert len(made) == 6


@torch.no_grad()
def test_autocast_has_matrices_of_its_own(model: ShareBertForMaskedLM) -> None:
    plain = model.sharebert(TOKENS).hidden
    with torch.autocast("cpu", torch.bfloat16):
        cast = model.sharebert(TOKENS).hidden
        assert torch.equal(cast, fresh(model))
    assert not torch.equal(cast.float(), plain)
    assert torch.equal(model.sharebert(TOKENS).hidden, plain)


def test_inference_tensors_have_no_counter_and_keep_nothing(made: list[int]) -> None:
    with torch.inference_mode():
        model = tiny_model().eval()
        before = model.sharebert(TOKENS).hidden
        model.sharebert.word_embeddings.weight.mul_(2)
        assert not torch.allclose(model.sharebert(TOKENS).hidden, before)
    assert made == [7, 7]


@torch.no_grad()
def test_weights_that_zero_3_gathers_are_not_kept(model: ShareBertForMaskedLM, made: list[int]) -> None:
    model.sharebert.word_embeddings.weight.ds_id = 0
    model.sharebert(TOKENS)
    model.sharebert(TOKENS)
    assert made == [7, 7]
    assert model.sharebert.sharing.kept._entry is None


@torch.no_grad()
def test_a_changed_module_is_called_each_time() -> None:
    model = tiny_model(sharing="veps").eval()
    before = model.sharebert(TOKENS).hidden
    plain = model.sharebert.factor_linear_all.forward
    model.sharebert.factor_linear_all.forward = lambda x: plain(x) * 2  # as accelerate does
    assert not torch.allclose(model.sharebert(TOKENS).hidden, before)
    del model.sharebert.factor_linear_all.forward
    assert torch.equal(model.sharebert(TOKENS).hidden, before)


@torch.no_grad()
def test_functional_calls_use_the_weights_that_they_are_given(model: ShareBertForMaskedLM) -> None:
    before = model.sharebert(TOKENS).hidden
    other = {name: tensor * 1.2 for name, tensor in model.sharebert.state_dict().items()}
    called = torch.func.functional_call(model.sharebert, other, (TOKENS,)).hidden
    assert not torch.allclose(called, before)
    assert torch.equal(model.sharebert(TOKENS).hidden, before)

    def under_vmap(scale: torch.Tensor) -> torch.Tensor:
        scaled = {name: tensor * scale for name, tensor in model.sharebert.state_dict().items()}
        return torch.func.functional_call(model.sharebert, scaled, (TOKENS,)).hidden

    several = torch.func.vmap(under_vmap)(torch.tensor([1.0, 1.2]))
    torch.testing.assert_close(several, torch.stack([before, called]), rtol=1e-4, atol=1e-5)


class Hidden(torch.nn.Module):
    """torch.jit.trace takes no None in an output."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.encoder(tokens).hidden  # type: ignore[no-any-return]


@torch.no_grad()
def test_compilers_and_exporters_record_the_making(model: ShareBertForMaskedLM) -> None:
    """What they record reads the parameters, not the kept matrices."""
    encoder = model.sharebert
    before = encoder(TOKENS).hidden
    program = torch.export.export(encoder, (TOKENS,))
    traced = torch.jit.trace(Hidden(encoder), TOKENS, check_trace=False)
    compiled = torch.compile(lambda tokens: encoder(tokens).hidden, backend="eager")
    assert torch.equal(encoder(TOKENS).hidden, before)
    torch.testing.assert_close(program.module()(TOKENS).hidden, before)
    torch.testing.assert_close(compiled(TOKENS), before)
    encoder.word_embeddings.weight.mul_(1.5)
    after = encoder(TOKENS).hidden
    assert not torch.allclose(after, before)
    torch.testing.assert_close(compiled(TOKENS), after)
    torch.testing.assert_close(traced(TOKENS), after)
    assert not any("kept" in name for name, _ in program.named_buffers())


@torch.no_grad()
def test_threads_at_once(model: ShareBertForMaskedLM) -> None:
    expected = fresh(model)
    found: list[bool] = []

    def run() -> None:
        with torch.no_grad():
            for turn in range(20):
                if turn % 5 == 0:
                    model.sharebert.forget_weights()
                found.append(torch.equal(model.sharebert(TOKENS, pool=turn % 2 == 0).hidden, expected))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80
    assert all(found)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_a_step_of_a_fused_optimizer_in_evaluation_is_noticed(optimizer: type[torch.optim.Optimizer]) -> None:
    """Fused optimizers do not raise version counters."""
    model = tiny_model().eval()
    tokens = torch.randint(5, 250, (2, 9))
    with torch.no_grad():
        before = model.sharebert(tokens).hidden
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer(model.parameters(), lr=0.1, fused=True).step()  # type: ignore[call-arg]
    with torch.no_grad():
        found = model.sharebert(tokens).hidden
        model.sharebert.forget_weights()
        assert found.equal(model.sharebert(tokens).hidden)
    assert not found.equal(before)
