"""Embeddings: the mean of the model's last hidden states over the prompt, of length one.

Said openly: a model that was trained to write is no embedding model; its means tell texts apart and put like ones nearer, no more.
`dimensions` keeps the first ones and makes them of length one again, which costs quality for a model that was not trained for it.
"""

import base64
from collections.abc import Sequence

import numpy as np

from garage.core.types import Completion
from garage.serve.asks import EmbedAsk
from garage.serve.errors import ApiError, Json

ABOUT = "mean of the last hidden states, of length one, of a model that was trained to write"


def embeddings_of(asked: EmbedAsk, completions: Sequence[Completion]) -> Json:
    """The answer to a request for embeddings.

    Raises:
        ApiError: it asks for more dimensions than there are.
    """
    data = [{"object": "embedding", "index": n, "embedding": _coded(done.embedding, asked)} for n, done in enumerate(completions)]
    used = sum(done.prompt_tokens for done in completions)
    return {"object": "list", "data": data, "model": asked.model, "usage": {"prompt_tokens": used, "total_tokens": used}}


def _coded(embedding: tuple[float, ...], asked: EmbedAsk) -> object:
    vector = np.array(embedding, dtype="<f4")
    if asked.dimensions is not None:
        if asked.dimensions > len(vector):
            raise ApiError(400, f"dimensions: {asked.dimensions} is more than the model has, {len(vector)}", param="dimensions")
        vector = vector[: asked.dimensions]
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    return vector.tolist() if asked.encoding_format == "float" else base64.b64encode(vector.tobytes()).decode()
