"""How long the parts of a trace are that does not exist yet."""

# Of a sequence: prompt, chain of thought, answer, as in OpenThoughts (arXiv 2512.21002, table 2).
SHARES = (0.05, 0.77, 0.18)
CLOSER = (3, 4, 5, 6)


def shared_lengths(num_tokens: int) -> tuple[int, int, int]:
    """Tokens of prompt, reasoning (with its close) and answer of a sequence by ``SHARES``."""
    prompt, _, answer = (max(1, int(share * num_tokens)) for share in SHARES)
    return prompt, max(len(CLOSER), num_tokens - prompt - answer), answer
