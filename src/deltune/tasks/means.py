"""A classification head on the mean of an encoder's last states."""

from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from deltune.tasks.encoding import masked_mean


class MeanForSequenceClassification(PreTrainedModel):
    """An encoder without its pooler, and a linear layer that reads its mean token.

    logits = W m + b with m = sum_t mask_t h_t / sum_t mask_t, where h_t are the states behind the
    last block and mask_t is 1 for a real token. Models that were made for the similarity of texts
    keep what they know of a text in m, not in the pooler that their files may still hold.

    The body has the name that the architecture's other heads have for it, so that a delta's places
    are called alike on all of them.

    Source: Reimers and Gurevych, "Sentence-BERT", 2019, arXiv:1908.10084, section 3 (mean pooling).

    Args:
        config: Of an encoder of transformers, with its number of labels.
    """

    config_class = PreTrainedConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # Whether the body can is asked when the body is made.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        body = AutoModel.from_config(config)
        if hasattr(body, "pooler"):
            body.pooler = None
        self.base_model_prefix = body.base_model_prefix
        setattr(self, self.base_model_prefix, body)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The body's table of tokens."""
        body: Any = self.base_model
        return body.get_input_embeddings()

    def get_output_embeddings(self) -> None:
        """None: nothing here writes tokens."""
        return

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutput:
        """Returns the logits (rows, labels), and with `labels` the loss of transformers' heads."""
        out = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        states = out.last_hidden_state
        mask = states.new_ones(states.shape[:2]) if attention_mask is None else attention_mask
        logits, loss = self.classifier(masked_mean(states, mask).to(states.dtype)), None
        if labels is not None:
            ask: Any = self.loss_function
            loss = ask(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions
        )
