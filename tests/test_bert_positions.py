"""More tokens than positions raise one clear error in a latent, packed or optimized BERT."""

import pytest
import torch
from transformers.models.bert.modeling_bert import BertEmbeddings

from hf_bnn import BinaryBertConfig, BinaryBertForMaskedLM, BinaryBertForSequenceClassification, optimize_, pack_

SIZE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 20}
STATES = {"latent": lambda model: model, "packed": pack_, "optimized": lambda model: optimize_(pack_(model))}


@pytest.mark.parametrize("kind", [BinaryBertForSequenceClassification, BinaryBertForMaskedLM])
@pytest.mark.parametrize(("state", "binarize"), [*((state, "both") for state in STATES), ("latent", "none")])
def test_more_tokens_than_positions_are_refused(kind: type, state: str, binarize: str):
    config = BinaryBertConfig(max_position_embeddings=16, binarize=binarize, **SIZE)
    model = STATES[state](kind(config).eval())
    ids, types = torch.zeros(1, 17, dtype=torch.long), torch.zeros(1, 17, dtype=torch.long)
    for inputs in (
        {"input_ids": ids},
        {"input_ids": ids, "token_type_ids": types},
        {"inputs_embeds": torch.zeros(1, 17, 32)},
    ):
        with pytest.raises(
            ValueError, match=r"17 tokens are more than the 16 positions .*: let the tokenizer cut them"
        ):
            model(**inputs)
    assert model(ids[:, :16]).logits.isfinite().all()


def test_what_the_embeddings_compute_is_not_changed():
    config = BinaryBertConfig(max_position_embeddings=16, embeddings="float", **SIZE)
    own = BinaryBertForSequenceClassification(config).eval().bert.embeddings
    stock = BertEmbeddings(config).eval()
    stock.load_state_dict(own.state_dict())
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(own(ids), stock(ids))
    assert torch.equal(own(ids, position_ids=ids % 5), stock(ids, position_ids=ids % 5))
