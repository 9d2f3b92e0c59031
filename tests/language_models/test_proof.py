import pytest

from lightning_accel.language_models.proof import EngineProof, judge


def proof(**kwargs):
    return EngineProof("llama.cpp", "gguf", **{"agreement": 1.0, **kwargs})


def test_a_near_tie_may_be_decided_otherwise_and_a_clear_choice_not():
    assert judge(proof(first_difference=3, margin=0.1)) == ""
    assert "prefers its own by 2 nats" in judge(proof(first_difference=3, margin=2.0))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"log_probability_error": 0.5}, "log-probabilities differ by 0.5 nats"),
        ({"perplexity": 20.0, "reference_perplexity": 10.0}, "its perplexity of 20.00 isn't the trained 10.00"),
        ({"tokenizer_equal": False}, "the tokenizer or the chat template"),
        ({"adapter_effect": 0.0, "adapter_error": 0.7}, "it ignores the adapter"),
        ({"adapter_effect": 0.9, "adapter_error": 0.4}, "with the adapter log-probabilities differ by 0.4"),
    ],
)
def test_each_difference_fails(fields, says):
    assert says in judge(proof(**fields))


def test_float32_engines_must_have_the_same_logits():
    assert "differ by 0.001 of their spread" in judge(
        EngineProof("transformers", "compressed-tensors", logit_error=1e-3)
    )
    assert judge(EngineProof("transformers", "compressed-tensors", logit_error=0.0)) == ""
    assert judge(proof(adapter_effect=0.9, adapter_error=0.01, perplexity=10.01, reference_perplexity=10.0)) == ""
