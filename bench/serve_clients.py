"""Other people's clients, each asked to do what it is for, against a running server. Runs in an environment of its own, offline.

    python bench/serve_clients.py lm-eval URL MODEL DIRECTORY      prints one JSON object
    python bench/serve_clients.py langchain URL MODEL
    python bench/serve_clients.py ollama URL MODEL

The environment: pip install "lm_eval[api]" schemathesis langchain-openai ollama openai transformers torch (see serve_conformance.py).
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

ITEMS = (
    ("Tom has 3 apples and gets 2 more. He has", ("5 apples.", "9 apples.", "no apples.")),
    ("The fox ran into the", ("forest.", "sky.", "number.")),
    ("2 + 2 =", ("4", "7", "11")),
    ("Anna went to the sea and saw a", ("boat.", "plus.", "wall of sums.")),
    ("Once upon a time there was a", ("little girl.", "minus.", "= 7.")),
)
TASK = """
task: garage_tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
num_fewshot: 0
metric_list: [{{metric: acc}}]
"""


def lm_eval(url: str, model: str, directory: str) -> dict[str, Any]:
    """`local-completions` on a small multiple-choice task that lies beside it; every log-likelihood it was told."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as place:
        rows = [{"context": context, "choices": list(choices), "answer": 0} for context, choices in ITEMS]
        data = Path(place, "rows.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path(place, "garage_tiny.yaml").write_text(TASK.format(data=data))
        arguments = (
            f"model={model},base_url={url}/v1/completions,num_concurrent=2,max_retries=1,tokenizer={directory},seed=1,max_length=512"
        )
        found = simple_evaluate(
            "local-completions",
            model_args=arguments,
            tasks=["garage_tiny"],
            task_manager=TaskManager(include_path=place),
            bootstrap_iters=0,
        )
    samples = sorted(found["samples"]["garage_tiny"], key=lambda sample: sample["doc_id"])
    told = [[{"logprob": float(r[0]), "is_greedy": str(r[1]) == "True"} for r in _pairs(sample)] for sample in samples]
    return {"accuracy": found["results"]["garage_tiny"]["acc,none"], "told": told}


def _pairs(sample: dict[str, Any]) -> list[Any]:
    """lm-eval keeps a request's answer as [[logprob, is_greedy]]."""
    return [answer[0] if isinstance(answer[0], (list, tuple)) else answer for answer in sample["resps"]]


def langchain(url: str, model: str, _: str) -> dict[str, Any]:
    """ChatOpenAI as an application uses it: invoke, batch, stream, bind_tools, with_structured_output, embeddings."""
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings
    from pydantic import BaseModel

    Digit = Literal[0, 1, 2, 3, 4, 5, 6, 7, 8, 9]  # nano writes digits without end

    class Sum(BaseModel):
        """A sum and its result."""

        left: Digit
        right: Digit

    @tool
    def add(left: Digit, right: Digit) -> int:
        """Add two numbers."""
        return left + right

    chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, max_tokens=400, temperature=0, max_retries=0, timeout=120)
    done: dict[str, Any] = {}
    first = chat.invoke([SystemMessage("Be short."), HumanMessage("What is 2 + 2?")])
    done["invoke"] = bool(first.content) and first.usage_metadata["output_tokens"] > 0
    done["batch"] = len(chat.batch(["One?", "Two?", "Three?"])) == 3
    pieces = list(chat.stream("What is 2 + 2?"))
    done["stream"] = "".join(piece.content for piece in pieces) == chat.invoke("What is 2 + 2?").content
    called = chat.bind_tools([add], tool_choice="any").invoke("Add 2 and 3.")
    done["bind_tools"] = bool(called.tool_calls) and set(called.tool_calls[0]["args"]) == {"left", "right"}
    call = {"name": "add", "args": {"left": 2, "right": 3}, "id": "call_1"}
    turns = [HumanMessage("Add 2 and 3."), AIMessage("", tool_calls=[call]), ToolMessage("5", tool_call_id="call_1")]
    done["tool message"] = isinstance(chat.bind_tools([add]).invoke(turns).content, str)
    for method in ("json_schema", "function_calling"):
        made = chat.with_structured_output(Sum, method=method).invoke("Add 2 and 3.")
        done[f"with_structured_output {method}"] = isinstance(made, Sum)
    embedder = OpenAIEmbeddings(base_url=f"{url}/v1", api_key="none", model=model, check_embedding_ctx_length=False, max_retries=0)
    vectors = embedder.embed_documents(["a fox", "a boat"])
    done["embeddings"] = len(vectors) == 2 and abs(sum(v * v for v in vectors[0]) - 1) < 1e-3
    return done


def ollama(url: str, model: str, _: str) -> dict[str, Any]:
    """What Ollama's own client gets (it speaks /api/*), and an application written for Ollama's OpenAI-compatible endpoint."""
    import ollama as client
    import openai

    done: dict[str, Any] = {}
    try:
        client.Client(host=url).chat(model=model, messages=[{"role": "user", "content": "hi"}])
        done["/api/chat"] = "answered"
    except client.ResponseError as error:
        done["/api/chat"] = f"not supported: {error.status_code}"
    with openai.OpenAI(base_url=f"{url}/v1", api_key="ollama", max_retries=0, timeout=120) as sdk:
        turns: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 2 + 2?"}]
        options: Any = {
            "temperature": 0,
            "max_tokens": 24,
            "seed": 1,
            "stop": ["\n\n\n"],
            "frequency_penalty": 0.5,
            "presence_penalty": 0.5,
        }
        done["chat"] = bool(sdk.chat.completions.create(model=model, messages=turns, top_p=0.9, **options).choices[0].message.content)
        stream = sdk.chat.completions.create(model=model, messages=turns, stream=True, stream_options={"include_usage": True}, **options)
        done["stream"] = [chunk.usage.completion_tokens for chunk in stream if chunk.usage][0] > 0  # noqa: RUF015
        form: Any = {"type": "json_object"}
        answer = sdk.chat.completions.create(model=model, messages=turns, response_format=form, max_tokens=64, temperature=0)
        choice = answer.choices[0]
        done["json mode"] = choice.finish_reason == "length" or isinstance(json.loads(choice.message.content or "null"), dict)
        done["completions"] = bool(sdk.completions.create(model=model, prompt="Once", max_tokens=8).choices[0].text)
        done["models"] = model in [each.id for each in sdk.models.list()]
        done["embeddings"] = len(sdk.embeddings.create(model=model, input=["a", "b"]).data) == 2
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("client", choices=("lm-eval", "langchain", "ollama"))
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("directory", nargs="?", default="")
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run = {"lm-eval": lm_eval, "langchain": langchain, "ollama": ollama}[options.client]
    print(json.dumps(run(options.url, options.model, options.directory)), file=answers, flush=True)


if __name__ == "__main__":
    sys.exit(main())
