"""`moe-core run`: a Hugging Face checkpoint folder, generated from through plugins."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import attrs
import click

from moe_core.cli import output
from moe_core.cli.generation import Comparison, Generation, compare, generate
from moe_core.cli.measure import PeakMemory
from moe_core.cli.models import DTYPES, LoadedModel, LoadOptions, load_model
from moe_core.cli.options import dispatch_option, experts_option, json_option
from moe_core.cli.plan_text import explain_plans, group_plans
from moe_core.cli.ranks import ranks

_DEFAULT_IDS = tuple(range(3, 11))  # 0 to 2 are special tokens in most vocabularies
_DEFAULT_PROMPT = "The capital of France is"

COMPARED_ROUNDS = 3
"""Generations of each side under --compare, in turn, after one to warm up."""


@click.command(short_help="Generate from a Hugging Face checkpoint folder, through plugins.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--prompt", help="The prompt as text, where the folder has a tokenizer.")
@click.option("--prompt-ids", metavar="IDS", help="The prompt as token ids, such as 1,2,3.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=16, show_default=True)
@click.option("--compare", "comparing", is_flag=True, help="Run transformers' own experts beside ours.")
@dispatch_option
@experts_option
@click.option(
    "--scheme",
    metavar="NAME",
    help="Run the experts in this scheme; floating-point ones are quantized while they load. Default: as stored.",
)
@click.option("--dtype", type=click.Choice(sorted(DTYPES)), help="Default: the checkpoint's own.")
@click.option("--device", metavar="DEVICE", help="cpu or cuda. Default: cuda where there is one.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that the checkpoint folder brings.")
@click.option("--debug", is_flag=True, help="Check expert ids and shapes on every step; slower.")
@json_option
def run(
    folder: Path,
    prompt: str | None,
    prompt_ids: str | None,
    max_new_tokens: int,
    comparing: bool,
    dispatch: str | None,
    experts: str | None,
    scheme: str | None,
    dtype: str | None,
    device: str | None,
    trust_remote_code: bool,
    debug: bool,
    as_json: bool,
) -> None:
    """Load a Hugging Face checkpoint folder, run its MoE blocks through plugins, and generate greedily.

    DIR holds config.json and safetensors files, sharded or not. Every shard is checked before anything is loaded, and
    nothing is ever downloaded. The plan of each layer is printed with its reasons.

    Under torchrun the experts are spread over its processes, each of which reads its own ones only.
    """
    with ranks(device) as here:
        options = LoadOptions(
            dispatch=dispatch,
            experts=experts,
            scheme=scheme,
            dtype=DTYPES[dtype] if dtype else None,
            device=here.device,
            trust_remote_code=trust_remote_code,
            debug=debug,
            group=here.group,
        )
        _run(folder, options, prompt, prompt_ids, max_new_tokens, comparing=comparing, as_json=as_json)


def _run(
    folder: Path,
    options: LoadOptions,
    prompt: str | None,
    prompt_ids: str | None,
    max_new_tokens: int,
    *,
    comparing: bool,
    as_json: bool,
) -> None:
    """Load, generate and print."""
    memory = PeakMemory(options.device)
    if comparing and options.group is not None:
        raise ValueError(
            "--compare: transformers' own experts would need all weights, and each rank holds its own experts only; "
            "run one process, or run without --compare"
        )
    loaded = load_model(folder, options)
    if comparing and not loaded.theirs:
        raise ValueError(
            "--compare: the experts stay packed, and transformers has none of its own for such weights; "
            "run without --compare"
        )
    ids = read_prompt(loaded, prompt, prompt_ids)
    if not as_json:
        output.emit(explain_plans(loaded.plans))
    total = max_new_tokens * (2 * (1 + COMPARED_ROUNDS) if comparing else 1)
    comparison: Comparison | None = None
    with output.progress("generating", total) as on_token:
        if comparing:
            generation, comparison = compare(loaded, ids, max_new_tokens, COMPARED_ROUNDS, on_token)
        else:
            generation = generate(loaded, ids, max_new_tokens, on_token)
    result = _result(loaded, ids, generation, comparison, memory)
    if as_json:
        groups = [group.to_dict() for group in group_plans(loaded.plans)]
        output.emit_json({**result, "notes": loaded.notes, "groups": groups})
    else:
        output.emit(_text(result, memory))


def read_prompt(loaded: LoadedModel, text: str | None, ids: str | None) -> list[int]:
    """The prompt's token ids.

    Raises:
        ValueError: both or an unusable one is given.
    """
    if text is not None and ids is not None:
        raise ValueError("--prompt and --prompt-ids are both given; pass one of them")
    if text is not None and loaded.tokenizer is None:
        raise ValueError(f"--prompt: {loaded.folder} has no tokenizer that can be used; pass --prompt-ids 1,2,3")
    vocabulary = int(loaded.model.config.get_text_config().vocab_size)
    if ids is not None:
        parts = re.split(r"[\s,]+", ids.strip(" ,"))
        if not all(part.isascii() and part.isdigit() and int(part) < vocabulary for part in parts):
            raise ValueError(f"--prompt-ids {ids!r}: expected numbers from 0 to {vocabulary - 1}, such as 1,2,3")
        return [int(part) for part in parts]
    if loaded.tokenizer is None:
        return [token for token in _DEFAULT_IDS if token < vocabulary]
    found = list(loaded.tokenizer(text if text is not None else _DEFAULT_PROMPT)["input_ids"])
    if not found:
        raise ValueError("--prompt: it is empty after tokenizing; pass some text, or --prompt-ids")
    return found


def _result(
    loaded: LoadedModel, ids: list[int], generation: Generation, comparison: Comparison | None, memory: PeakMemory
) -> dict[str, Any]:
    text = None if loaded.tokenizer is None else loaded.tokenizer.decode(generation.tokens)
    return {
        "folder": str(loaded.folder),
        "model_type": loaded.model.config.model_type,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": str(loaded.device),
        "prompt_ids": ids,
        "tokens": generation.tokens,
        "text": text,
        "ms_per_token": generation.ms_per_token if comparison is None else comparison.our_ms,
        "prompt_ms": generation.seconds[0] * 1e3,
        "peak_memory_bytes": memory.num_bytes,
        "compare": None if comparison is None else attrs.asdict(comparison),
    }


def _text(result: dict[str, Any], memory: PeakMemory) -> str:
    lines = [
        "",
        f"{result['model_type']}, {result['dtype']} on {result['device']}",
        f"prompt       {' '.join(map(str, result['prompt_ids']))}",
        f"tokens       {' '.join(map(str, result['tokens']))}",
    ]
    if result["text"] is not None:
        lines.append(f"text         {result['text']!r}")
    lines += [
        f"speed        {result['ms_per_token']:.1f} ms/token (median); {result['prompt_ms']:.1f} ms until the first",
        f"peak memory  {output.mebibytes(result['peak_memory_bytes'])} ({memory.kind})",
    ]
    if (compared := result["compare"]) is not None:
        first = compared["first_difference"]
        differs = "NO" if first is None else f"NO, first at new token {first}"
        lines += [
            f"compared     with transformers' own experts ({compared['theirs']}), same model, same prompt",
            f"  tokens equal              {'yes' if compared['tokens_equal'] else differs}",
            f"  largest logit difference  {compared['logit_difference']:.1e}",
            f"  ms/token                  {compared['our_ms']:.1f} ours, {compared['their_ms']:.1f} transformers",
            f"                            (medians of {COMPARED_ROUNDS} rounds in turn)",
        ]
    return "\n".join(lines)
