"""The words of the project: names and phrases that were replaced by the field's standard terms do not come back.

Each entry gives the term to use instead. A word that is standard in one place and private in another has a scope: the
files in which it is searched for. `EXCEPTIONS` and `ALLOWED` list what must keep an old word, with the reason.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sightline.config.renamed import RENAMED

ROOT = Path(__file__).parent.parent
CODE = [path for folder in ("sightline", "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py")]
TEXT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "RESULTS.md"]
TEXT += [*(ROOT / "scripts").rglob("*.*"), *(ROOT / "sightline").rglob("*.js"), *(ROOT / "sightline").rglob("*.html")]
FILES = sorted([path for path in CODE if path != Path(__file__)] + TEXT)

WORDS = {
    # identifiers
    r"Divisible|SHARDED|SUMMED": "TensorParallelLayer, SHARD_DIMS, PARTIAL_SUMS",
    r"auxiliary_loss|auxiliary_scale": "aux_loss, aux_loss_coef, aux_loss_scale",
    r"(?:un)?seeing": "visible, fully masked",
    r"look_further|prediction_weight|prediction_loss": "MTP module, mtp_loss_weight, mtp_loss",
    r"Taken|of_model|Subject": "PendingStep, model_metrics, MaskSource",
    r"Route|travel|way_back": "ExchangePlan, start_exchange, reverse",
    r"draw_weights|is_drawing": "init_model_weights, is_initializing",
    r"show_local|as_it_is|deal_out": "expose_local_parameters, identity_view, shard_experts",
    r"Pipelined|Speaker|speaker": "PipelinedModel, generation_model; the reporting rank",
    r"unspoken|ends_together": "suppress_tokens, pipeline_unsupported_reason",
    r"kv_rank|query_rank|plain_size|head_size": "kv_lora_rank, q_lora_rank, qk_nope_head_dim, head_dim",
    r"ffn": "intermediate_size",
    r"weigh_inputs|kept_groups|balance_rate": "score_before_experts, num_limited_groups, expert_bias_update_rate",
    r"own_tokens|whole_rows|whole_mask|on_one_process": "local_inputs, full_rows, full_mask, single_process_model",
    r"token_facts|loss_facts|ParameterFacts": "per_token_inputs, loss_inputs, ParameterInfo",
    r"attention_needs|head_groups|row_heads|row_group": "kernel_requirements, num_kv_heads, context_parallel_heads",
    r"place_patches|put_images|number_image_tokens": "locate_patches, insert_image_features, index_image_tokens",
    r"footprint|Ledger|Watched|pretending": "activation memory, MemoryTracker, traced, fake process group",
    # words
    r"lanes?": "shard",
    r"needles?": "leakage test, perturbation test",
    r"taps?": "convolution kernel",
    r"manieth|whence|sic": "plain English",
    r"normed": "normalized",
    r"sees": "attends to; may see",
    r"\w*(?:honour|colour|neighbour|favour|behaviour)\w*": "honor, color, neighbor, favor, behavior",
    r"centre[ds]?|grey|learnt|unlearnt": "US spelling",
    r"(?:initial|util|normal|serial|optim|quant|parallel|token)is(?:e[ds]?|ing|ation)": "US spelling",
    r"(?:synchron|recogn|material|general|orthogonal)is(?:e[ds]?|ing|ation)": "US spelling",
    # phrases
    r"(?:the|its|their|on the) way back|[Aa]nd back\.": "inverse, reverse exchange",
    r"at its height|so many-th|at hand|under way|no NaN is born|knows of the journey": "plain English",
    r"dealt? out|deals out": "distributed, sharded",
    r"(?:is|are) the truth|slow truth|the truth (?:for|every|all)": "reference",
    r"Errors:": "Raises:, in Google style",
}
WORDS_IN = {
    r"sightline/(?:layers|models)": {r"a memory|the memory|layers with a memory": "recurrent state, recurrent layer"},
    r"sightline/parallel/launch": {
        r"tell|tells|told|meets?|joined|stuck": "log, report, sync, distributed session, hang"
    },
    r"sightline/training": {r"tells?|told": "log, report"},
    r"sightline/planning|cli/show_plan": {r"moments|at work": "optimizer state, workspace, in flight"},
    r"sightline/config": {r"moments": "optimizer state"},
}
"""Words that are private only in these files."""
EXCEPTIONS = {
    "sightline/config/renamed.py": "the table of old names",
    "tests/test_renamed.py": "the tests of the old names",
}
"""Files that are not searched, and why."""
ALLOWED = {
    ("sightline/data/data_loader.py", "lanes"): "the name in checkpoints of version 0.2",
}
"""Single words that a file keeps, and why."""


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def words_for(name: str) -> dict[str, str]:
    """Return the words that a file must not contain, with the terms to use instead."""
    scoped = [words for scope, words in WORDS_IN.items() if re.search(scope, name)]
    return {word: instead for words in (WORDS, *scoped) for word, instead in words.items()}


@pytest.mark.parametrize("path", [path for path in FILES if relative(path) not in EXCEPTIONS], ids=relative)
def test_no_private_words(path: Path) -> None:
    name = relative(path)
    found = [
        f"{name}:{number}: {match[0]!r}; write: {instead}"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for word, instead in words_for(name).items()
        for match in re.finditer(rf"(?<!\w)(?:{word})(?!\w)", line)
        if (name, match[0]) not in ALLOWED
    ]
    assert not found, "\n".join(found)


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring, including those of fields and constants."""
    for node in ast.walk(ast.parse(path.read_text())):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield statement.lineno, text


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".py"], ids=relative)
def test_docstrings_name_their_subject(path: Path) -> None:
    """They begin with what is returned or done, not with a relative clause; errors stand below `Raises:`."""
    wrong = [
        f"{relative(path)}:{line}: {text.splitlines()[0]!r}"
        for line, text in docstrings(path)
        if re.match(r"(?:What|Of|Whose|And|So|But|As)\b", text) or re.search(r"\bRaises:[^\n]", text)
    ]
    assert not wrong, "\n".join(wrong)


def test_every_exception_is_needed() -> None:
    for name, word in ALLOWED:
        assert any(re.fullmatch(banned, word) for banned in words_for(name)), f"{word!r} needs no exception"
        assert re.search(rf"\b{word}\b", (ROOT / name).read_text()), f"{name} does not contain {word!r} any more"
    assert all((ROOT / name).is_file() for name in EXCEPTIONS)


@pytest.mark.parametrize("path", TEXT, ids=relative)
def test_no_old_option_in_the_documentation(path: Path) -> None:
    old = {name.replace("_", "-") for name, _ in RENAMED}
    options = re.findall(r"--(?:model|data|optimizer)\.(?:vision\.)?([a-z-]+)", path.read_text())
    assert not old & set(options)
