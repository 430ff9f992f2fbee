"""MLflow passes prompts, dialogues and tables to a model, and gets an answer to each."""

import math
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.exceptions import MlflowException

from qlora_exp.deploy.chat import Sampling
from qlora_exp.deploy.pyfunc import Predictor
from qlora_exp.tracking.stores import pyfunc_files
from qlora_exp.utils.errors import DataError


class Echo:
    """A chat model that answers with what it is asked."""

    def encoded(self, request, sampling):
        if request.messages[-1]["content"] == "too long":
            raise DataError("too long for the context")

    def answer(self, request, sampling):
        said = [f"{message['role'][0]}:{message['content']}" for message in request.messages]
        return "|".join([*said, *filter(None, [request.input]), str(sampling.max_new_tokens)])


def predict(data, **params):
    return Predictor(Echo()).predict(data, params)


DIALOGUE = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
PROMPTED, ASKED = "u:Hi|256", "s:Be brief.|u:Hi|256"


@pytest.mark.parametrize(
    ("data", "answers"),
    [
        ("Hi", [PROMPTED]),
        (["Hi", "Ho"], [PROMPTED, "u:Ho|256"]),
        (np.array(["Hi"]), [PROMPTED]),
        (pd.Series(["Hi"]), [PROMPTED]),
        (pd.DataFrame(["Hi"]), [PROMPTED]),
        (pd.DataFrame({"prompt": ["Hi", "Ho"]}), [PROMPTED, "u:Ho|256"]),
        ({"prompt": "Hi"}, [PROMPTED]),
        ({"prompt": ["Hi", "Ho"], "max_tokens": 3}, ["u:Hi|3", "u:Ho|3"]),
        ({"prompt": "Hi", "input": "there"}, ["u:Hi|there|256"]),
        (DIALOGUE, [ASKED]),
        ({"messages": DIALOGUE}, [ASKED]),
        ({"messages": np.array(DIALOGUE)}, [ASKED]),
        ({"messages": [DIALOGUE, DIALOGUE]}, [ASKED, ASKED]),
        ([DIALOGUE, {"messages": DIALOGUE}, "Hi"], [ASKED, ASKED, PROMPTED]),
        (pd.DataFrame([{"messages": DIALOGUE, "temperature": 0.5, "max_tokens": 3}]), ["s:Be brief.|u:Hi|3"]),
        (pd.DataFrame([{"messages": DIALOGUE, "max_tokens": 3}, {"prompt": "Hi"}]), ["s:Be brief.|u:Hi|3", PROMPTED]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": None}]}, [PROMPTED]),
        ([], []),
    ],
)
def test_prompts_dialogues_and_tables_are_answered(data, answers):
    assert predict(data) == answers


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "request 1: give either `messages`"),
        (None, "request 1: give either"),
        ({"messages": []}, "at least one"),
        ({"messages": DIALOGUE, "prompt": "Hi"}, "give either"),
        ({"prompt": "Hi", "n": 2}, "request 1: n: no field of a request here; those are messages, prompt, input"),
        (["Hi", {"prompt": "Hi", "max_tokens": 0}], "request 2: sampling: max_new_tokens=0 must be at least 1"),
        ({"prompt": "Hi", "temperature": "hot"}, "temperature: .*valid number.*'hot'"),
        ({"prompt": "Hi", "temperature": math.inf}, "temperature=inf"),
        ({"messages": [{"role": "me", "content": "Hi"}]}, "unknown role 'me'"),
        ({"messages": "Hi"}, "messages must be a list of messages"),
        (["Hi", "too long"], "request 2: too long for the context"),
        (b"Hi", "of the type bytes"),
    ],
)
def test_request_that_cannot_be_answered_is_refused_by_its_number(data, says):
    with pytest.raises(MlflowException, match=says) as error:
        predict(data)
    assert error.value.get_http_status_code() == 400


@given(st.lists(st.text()))
def test_each_prompt_is_asked_as_it_is(prompts):
    answers = [f"u:{prompt}|7" for prompt in prompts if prompt != "too long"]
    assert predict([prompt for prompt in prompts if prompt != "too long"], max_new_tokens=7) == answers


def test_params_in_the_signature_are_those_of_sampling():
    params = pyfunc_files.SIGNATURE.params.params
    assert {param.name: param.default for param in params} == asdict(Sampling())
