r"""Ask a doran server with the OpenAI SDK: the base model and every adapter are models, by name.

doran serve path/to/base --adapters path/to/adapters --port 8000
python client.py --url http://127.0.0.1:8000/v1 --prompt $'Review: a quiet triumph.\nSentiment:'
"""

from __future__ import annotations

import argparse
import asyncio

from openai import AsyncOpenAI


async def answers(url: str, prompt: str, tokens: int) -> dict[str, str]:
    """The answer of every model that the server lists, asked all at once."""
    async with AsyncOpenAI(base_url=url, api_key="none") as client:
        models = [model.id async for model in client.models.list()]

        async def ask(model: str) -> str:
            completion = await client.completions.create(model=model, prompt=prompt, max_tokens=tokens, temperature=0)
            return completion.choices[0].text

        return dict(zip(models, await asyncio.gather(*map(ask, models)), strict=True))


def main() -> None:
    """Print each model's answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--prompt", default="Review: a quiet triumph.\nSentiment:")
    parser.add_argument("--tokens", type=int, default=8)
    args = parser.parse_args()
    for model, text in asyncio.run(answers(args.url, args.prompt, args.tokens)).items():
        print(f"{model}: {text!r}")


if __name__ == "__main__":
    main()
