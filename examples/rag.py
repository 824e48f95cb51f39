"""python examples/rag.py EXPORT URL FOLDER QUESTION: a question over text files that stay here.

The passages are chosen on this machine (TF-IDF over paragraphs). With the question they leave as obfuscated embeddings.
The answer comes back in clear, and may quote them: the server reads what it says.
"""

import math
import re
import sys
from collections import Counter
from pathlib import Path

from sgt_titan.client import VLLM, StainedGlassTransform


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def best(paragraphs: list[str], question: str, count: int = 3) -> list[str]:
    """The paragraphs with the most of the question's rare words."""
    seen_in = Counter(word for paragraph in paragraphs for word in set(words(paragraph)))
    rare = {word: math.log(len(paragraphs) / seen_in[word]) for word in words(question) if word in seen_in}

    def score(paragraph: str) -> float:
        counts = Counter(words(paragraph))
        return sum(weight * counts[word] / (1 + counts[word]) for word, weight in rare.items())

    return sorted(paragraphs, key=score, reverse=True)[:count]


def main(export: str, url: str, folder: str, question: str) -> str:
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(folder).glob("*.txt"))]
    passages = best([part.strip() for text in texts for part in text.split("\n\n") if part.strip()], question)
    sgt = StainedGlassTransform.from_pretrained(export)
    content = "Answer from these notes.\n\n" + "\n\n".join(passages) + f"\n\nQuestion: {question}"
    embeds_TD = sgt.encode([{"role": "user", "content": content}])
    return VLLM(url).generate(embeds_TD, max_tokens=200, temperature=0.0).text


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
