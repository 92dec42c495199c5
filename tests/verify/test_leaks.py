"""Leakage test: planted faults are found where they are, right modules raise no alarm, and nothing is left changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from sightline import Batch
from sightline.attention import attend
from sightline.masks import AttentionMask, causal, document, shared_prefix, sliding_window
from sightline.models import VLMConfig, build_model
from sightline.verify import LeakReport, leaks
from tests.parallel.context.rows import LENGTHS, pack, pack_images
from tests.support.processes import run_on_ranks

IDS = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3, [3] * 7 + [4] * 2 + [-1] * 3])
MASK = causal(2, 12) & document(IDS)
TOKENS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        q, k, v = (part.unflatten(2, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=2))
        return self.out(attend(q, k, v, mask, backend="reference").transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Feed-forward layer; `capacity`: only so many tokens of a row are computed, those with the largest scores."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        self.up, self.down, self.capacity = nn.Linear(16, 32), nn.Linear(32, 16), capacity

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(x)))
        if self.capacity is None:
            return y
        chosen = y.detach().sum(dim=2).argsort(dim=1).argsort(dim=1) < self.capacity
        return y * chosen[..., None]


class Block(nn.Module):
    """A layer with attention and a feed-forward layer: in turn, or in parallel on one input."""

    def __init__(self, parallel: bool = False) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp, self.parallel = nn.LayerNorm(16), Attention(), Mlp(), parallel

    def forward(self, h: Tensor, mask: AttentionMask) -> Tensor:
        x = self.norm(h)
        after = h + self.attention(x, mask)
        return after + self.mlp(x if self.parallel else after)


class Model(nn.Module):
    def __init__(self, depth: int = 3, parallel: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(Block(parallel) for _ in range(depth))
        self.dropout, self.head = nn.Dropout(0.2), nn.Linear(16, 50)
        self.wrap: Callable[[Tensor], Any] = lambda logits: logits

    def forward(self, tokens: Tensor, mask: AttentionMask = MASK) -> Any:
        h = self.embedding(tokens)
        for layer in self.layers:
            h = layer(h, mask)
        return self.wrap(self.head(self.dropout(h)))


def test(model: nn.Module, masks: Any = MASK, **options: Any) -> LeakReport:
    return leaks(model, {"tokens": TOKENS}, masks, **options)


test.__test__ = False  # type: ignore[attr-defined]


def mix(x: Tensor, amount: float = 0.1) -> Tensor:
    """Add some of the previous token, whatever document it is of."""
    return x + amount * F.pad(x, (0, 0, 1, 0))[:, :-1]


def replace_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    module.register_forward_hook(lambda _m, _args, out: change(out))


def without_mask(model: Model, layer: int, mask: AttentionMask) -> None:
    attention = model.layers[layer].attention
    attention.register_forward_pre_hook(lambda _m, args: (args[0], mask))


class Flattened(Attention):
    """Attention over all rows as one."""

    def forward(self, x: Tensor, mask: AttentionMask) -> Tensor:
        return super().forward(x.flatten(0, 1)[None], causal(1, x.shape[0] * x.shape[1])).view_as(x)


class BlockThatMixes(Block):
    def forward(self, h: Tensor, mask: AttentionMask) -> Tensor:
        return super().forward(mix(h), mask)


def plant(fault: str, model: Model) -> None:
    if fault == "layer without documents":
        without_mask(model, 1, causal(2, 12))
    elif fault == "layer without causality":
        without_mask(model, 2, document(IDS))
    elif fault == "rows as one row":
        model.layers[0].attention = Flattened()
    elif fault == "mixing embedding":
        replace_output(model.embedding, mix)
    elif fault == "mixing head":
        replace_output(model.head, mix)
    elif fault == "mixing between submodules":
        model.layers[2] = BlockThatMixes()
    elif fault == "tiny amount of the previous token":
        replace_output(model.layers[1].mlp, lambda x: mix(x, 1e-9))
    elif fault == "experts with a capacity":
        model.layers[1].mlp = Mlp(capacity=6)
    elif fault == "mean over the row":
        replace_output(model.layers[0].norm, lambda x: x - 0.1 * x.mean(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("fault", "layer", "kind"),
    [
        ("layer without documents", "layers.1.attention", "attention"),
        ("layer without causality", "layers.2.attention", "attention"),
        ("rows as one row", "layers.0.attention", "attention"),
        ("mixing embedding", "embedding", "embedding"),
        ("mixing head", "head", "head"),
        ("mixing between submodules", "layers.2", "layer"),
        ("tiny amount of the previous token", "layers.1.mlp", "mlp"),
        ("experts with a capacity", "layers.1.mlp", "mlp"),
        ("mean over the row", "layers.0.norm", "norm"),
    ],
)
@pytest.mark.parametrize("parallel", [False, True], ids=["sequential", "parallel"])
def test_planted_fault_is_found_in_its_layer(fault: str, layer: str, kind: str, parallel: bool) -> None:
    model = Model(parallel=parallel)
    assert not test(model).leaks
    plant(fault, model)
    report = test(model)
    assert report.leaks and (report.layer, report.kind) == (layer, kind), str(report)
    assert f"from {layer} ({kind}) on" in str(report)
    (row, token), (other_row, other_token) = report.target, report.source
    assert IDS[row, token] >= 0 and ((row, token) != (other_row, other_token))


def test_each_measurement_finds_leaks_that_the_other_cannot() -> None:
    """A change of 1e-9 is below rounding, and a selection has no gradient."""
    tiny, selecting = Model(), Model()
    plant("tiny amount of the previous token", tiny)
    plant("experts with a capacity", selecting)
    report = test(tiny)
    assert report.gradient > 0 and report.change < 1e-6
    report = test(selecting)
    assert report.gradient == 0 and report.change > 1e-3


def test_leak_from_padding_is_found() -> None:
    model = Model()
    without_mask(model, 0, causal(2, 12) & document(IDS) | document(torch.zeros_like(IDS), torch.where(IDS < 0, 0, -1)))
    report = test(model)
    assert report.leaks and report.layer == "layers.0.attention"
    assert IDS[report.source] == -1


def test_rounding_of_experts_is_no_leak() -> None:
    model = Model()
    replace_output(model.layers[0].mlp, lambda x: x * (1 + 1e-6 * x.detach().mean()))
    report = test(model)
    assert not report.leaks and report.gradient == 0 and 0 < report.change < 1e-4


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_windows_reach_further_in_each_layer_and_no_further(depth: int) -> None:
    window = MASK & sliding_window(2, 12, 2)
    model = Model(depth)
    batch = {"tokens": TOKENS, "mask": window}
    assert not leaks(model, batch, [window] * depth, tokens_per_document=None).leaks
    without_mask(model, 0, MASK & sliding_window(2, 12, 3))
    assert leaks(model, batch, [window] * depth, tokens_per_document=None).leaks
    assert not leaks(model, batch, window).leaks  # one mask for any number of layers: any distance


def test_shared_prefix_may_influence_its_responses_only() -> None:
    ids = torch.tensor([[0] * 4 + [1] * 4 + [2] * 4] * 2)
    tree = shared_prefix(ids, torch.zeros_like(ids)) & causal(2, 12)
    model = Model()
    assert not leaks(model, {"tokens": TOKENS, "mask": tree}, tree).leaks
    assert leaks(model, {"tokens": TOKENS, "mask": causal(2, 12)}, tree).leaks


@pytest.mark.parametrize(
    "family",
    [
        *("llama4", "qwen3_next", "deepseek_v3", "gpt_oss", "vlm"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama3", "qwen3")),  # the attention of the others
    ],
)
def test_our_models_do_not_leak(family: str) -> None:
    model = build_model(f"{family}-debug")
    config = model.config
    batch = pack_images(config) if isinstance(config, VLMConfig) else pack(LENGTHS, config.vocab_size)
    images = [config.image_token_id] if isinstance(config, VLMConfig) else []
    masks = model.get_attention_masks(batch)
    report = leaks(model, batch, masks, fixed_ids=images)
    assert not report.leaks and report.gradient == 0, str(report)
    wrong = causal(*batch.shape)
    names = list(masks) if isinstance(masks, dict) else ["attention"]
    inputs = {"tokens": batch.tokens, "positions": batch.positions, **batch.extra}
    report = leaks(
        model, {**inputs, "attention_masks": dict.fromkeys(names, wrong)}, masks, fixed_ids=images, max_trials=1
    )
    expected = "layers.0.mixer.convolution" if family == "qwen3_next" else "layers.0.attention"
    assert report.leaks and report.layer == expected and report.trials[0] == 1


def test_bfloat16_and_training_with_dropout() -> None:
    for model in (Model().train(), Model().bfloat16().eval()):
        report = test(model)
        assert not report.leaks and (report.gradient, report.change) == (0, 0)
        plant("layer without documents", model)
        assert test(model).layer == "layers.1.attention"


def count_call(module: nn.Module, _args: Any, _out: Tensor) -> None:
    module.calls.add_(1)


def test_module_is_left_as_it_was() -> None:
    model = Model().train()
    model.layers[0].norm.register_buffer("calls", torch.zeros(()))
    model.layers[0].norm.register_forward_hook(count_call)
    model.head.requires_grad_(False)
    model.embedding.weight.grad = torch.ones_like(model.embedding.weight)
    plant("layer without documents", model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    seed = torch.get_rng_state()
    with torch.inference_mode():
        assert test(model).leaks
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == hooks
    assert torch.equal(seed, torch.get_rng_state()) and model.training
    assert torch.equal(model.embedding.weight.grad, torch.ones_like(model.embedding.weight))
    assert model.head.weight.grad is None and model.layers[0].mlp.up.weight.grad is None


def test_hooks_are_removed_when_the_module_raises() -> None:
    model = Model()

    def fail(logits: Tensor) -> Tensor:
        raise RuntimeError("of the module")

    model.wrap = fail
    with pytest.raises(RuntimeError, match="of the module"):
        test(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: (torch.zeros(()), logits, None),
        lambda logits: {"loss": logits.mean(), "logits": logits},
        lambda logits: [(logits,)],
    ],
)
def test_outputs_in_containers(wrap: Callable[[Tensor], Any]) -> None:
    model = Model()
    model.wrap = wrap
    assert not test(model).leaks
    plant("layer without documents", model)
    assert test(model).layer == "layers.1.attention"


def test_compiled_modules() -> None:
    inner = Model()
    compiled = torch.compile(inner, backend="eager")
    compiled(TOKENS)
    report = test(compiled)
    assert not report.leaks and report.gradient == 0
    plant("layer without documents", inner)
    assert test(compiled).layer.endswith("layers.1.attention")
    inner = Model()
    inner.layers[1].compile(backend="eager")
    inner(TOKENS)
    plant("layer without documents", inner)
    assert test(inner).layer == "layers.1.attention"


def test_recomputation() -> None:
    model = Model().train()
    for layer in model.layers:
        forward = layer.forward
        layer.forward = lambda h, mask, forward=forward: checkpoint(forward, h, mask, use_reentrant=False)
    assert not test(model).leaks
    plant("layer without documents", model)
    assert test(model).layer == "layers.1.attention"


def wrapped(rank: int, kind: str) -> list[tuple[bool, float | None, str | None]]:
    found = []
    for fault in ("", "layer without documents"):
        model = Model()
        plant(fault, model)
        whole: nn.Module = model
        if kind == "ddp":
            whole = DistributedDataParallel(model)
        else:
            for layer in model.layers:
                fully_shard(layer)
            fully_shard(model)
        report = test(whole)
        assert kind == "ddp" or all(isinstance(p, DTensor) for p in whole.parameters())  # sharded, for an optimizer
        found.append((report.leaks, report.gradient, report.layer))
        whole(TOKENS).float().sum().backward()  # training goes on
    return found


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_wrapped_modules_on_two_ranks(kind: str) -> None:
    prefix = "module." if kind == "ddp" else ""
    for right, wrong in run_on_ranks(2, wrapped, kind):
        assert right == (False, 0, None)
        assert wrong[0] and wrong[1] > 0 and wrong[2] == f"{prefix}layers.1.attention"


def test_embeddings_as_input_of_a_single_layer() -> None:
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1))
    report = leaks(Attention(), {"x": x, "mask": MASK}, MASK, tokens="x")
    assert not report.leaks and report.gradient == 0
    report = leaks(Attention(), {"x": x, "mask": causal(2, 12)}, MASK, tokens="x")
    assert report.leaks and report.layer == "" and "in no submodule" in str(report)


class WithoutEmbedding(Model):
    """The tokens are embedded by a function, so there is no output of a module to differentiate by."""

    def forward(self, tokens: Tensor, mask: AttentionMask = MASK) -> Any:
        return self.layers[0](F.embedding(tokens, self.embedding.weight), mask)


def test_gradient_that_cannot_be_computed_is_reported() -> None:
    report = test(WithoutEmbedding())
    assert not report.leaks and report.gradient is None and "gradient not computed" in str(report)
    assert leaks(WithoutEmbedding(), {"tokens": TOKENS, "mask": causal(2, 12)}, MASK).leaks


def test_fixed_ids_are_not_changed() -> None:
    """Token 7 marks places that a model fills itself; another number of them is an error."""
    tokens = TOKENS.clone()
    tokens[0, :3] = 7
    model = Model()

    def check(_module: nn.Module, args: tuple[Tensor]) -> None:
        if not torch.equal(args[0] == 7, tokens == 7):
            raise RuntimeError("number of images")

    model.embedding.register_forward_pre_hook(check)
    with pytest.raises(RuntimeError, match="number of images"):
        leaks(model, {"tokens": tokens}, MASK)
    assert not leaks(model, {"tokens": tokens}, MASK, fixed_ids=[7]).leaks


def test_wrong_input_is_refused() -> None:
    model = Model()
    with pytest.raises(ValueError, match=r"found no tokens.*which has ids; expected one of input_ids"):
        leaks(model, {"ids": TOKENS}, MASK)
    with pytest.raises(ValueError, match=r"tokens are \(2, 12\), but the masks are AttentionMask\(B=1"):
        leaks(model, {"tokens": TOKENS}, causal(1, 12))
    with pytest.raises(ValueError, match=r"1 different tokens that may be changed, expected at least two: \[3\]"):
        leaks(model, {"tokens": torch.full((2, 12), 3)}, MASK)
    model.wrap = lambda logits: logits.mean()
    with pytest.raises(ValueError, match=r"returned no floating-point tensor \[2, 12, ...\]"):
        test(model)
    model.wrap = torch.zeros_like
    with pytest.raises(ValueError, match="no output changes with any token"):
        test(model)
    model.wrap = lambda logits: logits / 0
    with pytest.raises(ValueError, match="outputs are not finite"):
        test(model)


def test_batch_of_one_document_tests_its_later_tokens() -> None:
    batch = Batch.from_documents([list(range(10))], length=10)
    model = build_model("llama3-debug")
    report = leaks(model, batch, model.get_attention_masks(batch))
    assert not report.leaks and report.documents == 1 and report.trials == (2, 2)
