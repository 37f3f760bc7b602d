"""A pre-trained text encoder in place of CLIP's text tower, a baseline of LaCLIP's paper:

    python train_clip.py --text-model sentence-transformers/all-MiniLM-L6-v2 [--freeze-text] ...
"""
import torch
import transformers
from transformers import AutoConfig, AutoModelForTextEncoding


def build(config):
    """A transformers encoder (BERT, RoBERTa, T5, ...) with random weights; config: its own, a dict.

    It stays in eval mode: dropout would differ between a micro-batch's two passes, and after a
    restart."""
    encoder = AutoModelForTextEncoding.from_config(
        AutoConfig.for_model(**config), dtype=torch.float32, attn_implementation="sdpa",
        trust_remote_code=False)
    encoder.pooler = None  # unused, and DDP waits for the gradient of every parameter
    return encoder.eval()


def mean_over_tokens(encoder, texts):
    """Texts -> [B, W]: the mean of the encoder's outputs at all tokens of a text, the start and end
    token included.

    LaCLIP does not say how it pools (assumed): Sentence-BERT (arXiv 1908.10084) finds the mean at
    least as good as the class token, and T5 has no class token."""
    lengths = texts.starts.diff()  # [B], ascending
    mask = torch.arange(texts.groups[-1][0], device=lengths.device) < lengths[:, None]  # [B, L]
    ids = torch.zeros_like(mask, dtype=torch.long).masked_scatter(mask, texts.ids)
    states = encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
    means = (states * mask[..., None]).sum(1) / lengths[:, None]  # [B, W], shortest text first
    return means[torch.searchsorted(texts.starts[1:], texts.ends.int(), right=True)]


def load(name, context_length, vocab_size):
    """A folder or hub name -> the encoder's configuration as a dict, its width, its pre-trained
    weights {name in CLIP: tensor}. OSError if there is none, or if it takes no such texts."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        encoder, report = AutoModelForTextEncoding.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
        with torch.no_grad():
            encoder.eval()(input_ids=torch.full((1, context_length), vocab_size - 1))
    except IndexError:
        raise OSError(f"--text-model {name}: no texts of {context_length} tokens (--context-length) "
                      f"with ids up to {vocab_size - 1}") from None
    except ValueError as e:  # transformers, for a model that is no text encoder
        raise OSError(f"--text-model {name}: {str(e).splitlines()[0]}") from None
    if missing := [key for key in report["missing_keys"] if not key.startswith("pooler.")]:
        raise OSError(f"--text-model {name}: its weights lack {missing[0]} and {len(missing) - 1} more")
    encoder.pooler = None
    weights = {f"text_encoder.{key}": value for key, value in encoder.state_dict().items()}
    return encoder.config.to_dict(), encoder.config.hidden_size, weights
