"""Tools that replace modules, weights or forwards: adapters, quantisers, offloading, tracing, DistributedDataParallel.

The matrices of all layers are made from two weights. Where a tool has changed the module that holds one, the module
is called in place of reading its weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

pytest.importorskip("transformers")

from hub_models import FORMS, hub_model, padded_batch

from sharebert import hub
from sharebert.plain_modules import is_plain

IDS, MASK = padded_batch()

form = pytest.mark.parametrize(("head", "sharing"), FORMS)


class LoraLinear(nn.Module):
    """As PEFT's: the module is replaced, and still shows the base layer's weight."""

    def __init__(self, base: nn.Linear | nn.Embedding, scale: float = 0.5) -> None:
        super().__init__()
        self.base = base
        shape = base.weight.shape
        self.a = nn.Parameter(torch.randn(2, shape[1]) * scale)
        self.b = nn.Parameter(torch.randn(shape[0], 2) * scale)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.base, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base, nn.Embedding):
            return self.base(x) + self.b[x] @ self.a  # type: ignore[no-any-return]
        return self.base(x) + x @ self.a.t() @ self.b.t()  # type: ignore[no-any-return]

    def merged(self) -> nn.Module:
        with torch.no_grad():
            self.base.weight += self.b @ self.a
        return self.base


TARGETS = ("sharebert.word_embeddings", "sharebert.factor_linear_all", "sharebert.factor_linear", "mlm_head.dense",
           "mlm_head.decoder", "sharebert.position_embeddings")  # fmt: skip


@pytest.mark.parametrize("target", TARGETS)
@form
def test_an_adapter_acts_trains_and_merges(target: str, head: str, sharing: str) -> None:
    model = hub_model(hub.ShareBertForMaskedLM, mlm_head=head, sharing=sharing)
    before = model(IDS, MASK).logits
    parent, _, name = target.rpartition(".")
    if not hasattr(model.get_submodule(parent), name):
        pytest.skip("this form has no such module")
    adapter = LoraLinear(getattr(model.get_submodule(parent), name))
    setattr(model.get_submodule(parent), name, adapter)
    output = model(IDS, MASK, labels=IDS)
    assert (output.logits - before).abs().max() > 1e-2
    output.loss.backward()
    for parameter in (adapter.a, adapter.b):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 0
    setattr(model.get_submodule(parent), name, adapter.merged())
    torch.testing.assert_close(model(IDS, MASK).logits, output.logits, rtol=1e-3, atol=1e-3)


@form
def test_an_adapter_that_is_merged_at_once(head: str, sharing: str) -> None:
    """As PEFT merges: it writes to `.data`, which the matrices that evaluation keeps cannot see."""
    model = hub_model(hub.ShareBertForMaskedLM, mlm_head=head, sharing=sharing).eval()
    encoder = model.sharebert
    with torch.no_grad():
        before = model(IDS, MASK).logits
        words = encoder.word_embeddings
        encoder.word_embeddings = LoraLinear(words)
        words.weight.data += 0.1 * torch.randn(words.weight.shape)
        encoder.word_embeddings = words
        merged = model(IDS, MASK).logits
        fresh = copy.deepcopy(model)(IDS, MASK).logits
    assert (merged - before).abs().max() > 1e-2
    torch.testing.assert_close(merged, fresh)


@pytest.mark.parametrize("targets", [["factor_linear_all"], ["word_embeddings"], ["dense"], "all-linear"])
def test_peft_itself(targets: Any) -> None:
    peft = pytest.importorskip("peft")
    model = hub_model(hub.ShareBertForMaskedLM)
    before = model(IDS, MASK).logits
    lora = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora).eval()
    output = adapted(input_ids=IDS, attention_mask=MASK, labels=IDS)
    assert (output.logits - before).abs().max() > 1e-2
    output.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapted.parameters() if p.requires_grad)
    merged = adapted.merge_and_unload()(IDS, MASK).logits
    torch.testing.assert_close(merged, output.logits, rtol=1e-3, atol=1e-3)


def near(made: Tensor, expected: Tensor) -> None:
    """As good as eight bits can be: the scores differ by a small part of their size."""
    assert (made - expected).norm() < 0.06 * expected.norm()


@form
def test_dynamic_quantisation(head: str, sharing: str) -> None:
    model = hub_model(hub.ShareBertForMaskedLM, mlm_head=head, sharing=sharing)
    with torch.no_grad():
        expected = model(IDS, MASK).logits
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        near(quantised(IDS, MASK).logits, expected)


@form
def test_weight_only_quantisation(head: str, sharing: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = hub_model(hub.ShareBertForMaskedLM, mlm_head=head, sharing=sharing)
    with torch.no_grad():
        expected = model(IDS, MASK).logits
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        near(model(IDS, MASK).logits, expected)


class EightBits(nn.Linear):
    """As bitsandbytes' Linear8bitLt: a subclass of nn.Linear whose weight holds integers."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((base.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@form
def test_modules_whose_weights_are_integers(head: str, sharing: str) -> None:
    model = hub_model(hub.ShareBertForMaskedLM, mlm_head=head, sharing=sharing)
    with torch.no_grad():
        expected = model(IDS, MASK).logits
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear:
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, EightBits(module))
        near(model(IDS, MASK).logits, expected)


def test_only_modules_as_this_project_made_them_are_plain() -> None:
    plain = nn.Linear(3, 3)
    assert is_plain(plain)
    assert is_plain(nn.Embedding(3, 3))
    assert not is_plain(LoraLinear(plain))
    assert not is_plain(EightBits(plain))
    assert not is_plain(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    plain.forward = lambda x: x
    assert not is_plain(plain)


@form
@pytest.mark.parametrize("to", ["cpu", "disk"])
@pytest.mark.parametrize("kind", [hub.ShareBertForMaskedLM, hub.ShareBertModel])
def test_offloaded_weights_come_when_they_are_needed(
    kind: type, to: str, head: str, sharing: str, tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = hub_model(kind, mlm_head=head, sharing=sharing)
    device = torch.device("cpu")
    with torch.no_grad():
        expected = model(IDS, MASK).to_tuple()
        if to == "cpu":
            accelerate.cpu_offload(model, execution_device=device)
        else:
            accelerate.disk_offload(model, tmp_path, execution_device=device)
        made = model(IDS, MASK).to_tuple()
    assert model.sharebert.word_embeddings.weight.is_meta
    for ours, theirs in zip(made, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# Tracing

LONGER = torch.randint(5, 250, (2, 12), generator=torch.Generator().manual_seed(2))


@form
@pytest.mark.parametrize("kind", [hub.ShareBertForMaskedLM, hub.ShareBertForSequenceClassification])
def test_jit_trace(kind: type, head: str, sharing: str) -> None:
    """As openvino.convert_model does too; the traced model takes rows of another length."""
    model = hub_model(kind, mlm_head=head, sharing=sharing)
    model.config.return_dict = False
    traced = torch.jit.trace(model, (IDS, MASK))
    for ids, mask in ((IDS, MASK), (LONGER, torch.ones_like(LONGER))):
        torch.testing.assert_close(traced(ids, mask)[0], model(ids, mask)[0])


@form
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict: bool, head: str, sharing: str) -> None:
    model = hub_model(hub.ShareBertForMaskedLM, mlm_head=head, sharing=sharing)
    rows, length = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("length", min=2, max=16)
    sizes = {"input_ids": {0: rows, 1: length}, "attention_mask": {0: rows, 1: length}}
    exported = torch.export.export(
        model, (), {"input_ids": IDS, "attention_mask": MASK}, dynamic_shapes=sizes, strict=strict
    ).module()
    for ids, mask in ((IDS, MASK), (LONGER, torch.ones_like(LONGER))):
        torch.testing.assert_close(exported(input_ids=ids, attention_mask=mask).logits, model(ids, mask).logits)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@form
def test_training_compiles_as_one_graph(head: str, sharing: str, fresh_dynamo: None) -> None:
    model = hub_model(hub.ShareBertForMaskedLM, mlm_head=head, sharing=sharing).train()
    model(IDS, MASK, labels=IDS).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(IDS, MASK, labels=IDS).loss.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


# DistributedDataParallel


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@form
@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_distributed_data_parallel(pooling: str, head: str, sharing: str, one_process: None) -> None:
    """Two steps: a parameter without a gradient in the first is an error in the second."""
    for kind, labels in (
        (hub.ShareBertForMaskedLM, IDS),
        (hub.ShareBertForTokenClassification, IDS % 2),
        (hub.ShareBertForSequenceClassification, torch.tensor([0, 1, 1])),
    ):
        model = hub_model(kind, mlm_head=head, sharing=sharing, classifier_pooling=pooling).train()
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(model))
        for _ in range(2):
            parallel(IDS, MASK, labels=labels).loss.backward()
        model(IDS, MASK, labels=labels).loss.backward()
        for ours, alone in zip(parallel.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, 2 * alone.grad)
