"""openmsa generate: text from a prompt, streamed as it comes."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path

from openmsa.cli.arguments import add_model_options, whole_number
from openmsa.cli.console import progress, say
from openmsa.cli.door import UsageError, usage_checked
from openmsa.cli.models import load_model, load_tokenizer
from openmsa.cli.texts import documents
from openmsa.evaluation.plain import write_json

DESCRIPTION = (
    "Continue a prompt with a dense or an MSA model. The prompt comes from --prompt, --file or "
    "standard input; text goes to standard output, the timing to standard error."
)
EXAMPLE = "openmsa generate runs/demo/msa --file README.md --max-new-tokens 64"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder, or name on the hub")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", help="the prompt itself")
    source.add_argument("--file", type=Path, help="a text file that holds the prompt")
    number = whole_number(1)
    parser.add_argument("--max-new-tokens", type=number, default=128, help="stop after so many")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from this much probability")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument(
        "--prefill-tokens", type=number, default=2048, help="prompt tokens read at a time"
    )
    parser.add_argument("--out", type=Path, help="folder for generation.json")
    add_model_options(parser)


def run(arguments: argparse.Namespace) -> None:
    prompt = read_prompt(arguments)
    from openmsa.inference import Sampling, generate

    with usage_checked():
        sampling = Sampling(arguments.temperature, arguments.top_p, arguments.seed)
    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model, device=arguments.device, dtype=arguments.dtype)
    with ExitStack() as reading:
        reading.enter_context(progress("reading the prompt"))

        def show(text: str) -> None:
            reading.close()  # the bar makes way for the text
            print(text, end="", flush=True)

        told = generate(
            model,
            tokenizer,
            prompt,
            max_new_tokens=arguments.max_new_tokens,
            sampling=sampling,
            prefill_tokens=arguments.prefill_tokens,
            on_text=show,
        )
    print()
    say(
        f"{told.prompt_tokens} prompt tokens; first token after {told.first_token_s:.2f} s, then "
        f"{told.token_ms:.1f} ms each; {len(told.tokens)} tokens, stopped by {told.stopped_by}"
    )
    if arguments.out:
        write_json(arguments.out / "generation.json", told)


def read_prompt(arguments: argparse.Namespace) -> str:
    """The prompt from where the user put it. Raises UsageError where there is none."""
    if arguments.prompt is not None:
        prompt = arguments.prompt
    elif arguments.file:
        (prompt,) = documents([arguments.file])
    elif sys.stdin.isatty():
        raise UsageError("no prompt: give --prompt TEXT, --file PATH, or text on standard input")
    else:
        prompt = sys.stdin.read()
    if not prompt:
        raise UsageError("the prompt is empty; give at least one character to continue")
    return prompt
