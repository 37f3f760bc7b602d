"""A pre-trained text encoder in place of CLIP's text tower, a baseline of LaCLIP's paper:

    python train_clip.py --text-model sentence-transformers/all-MiniLM-L6-v2 [--freeze-text] ...
"""
import torch
import transformers
from transformers import AutoConfig, AutoModelForTextEncoding


def replace_text_tower(model):
    """Put the encoder that config.text_model describes (BERT, RoBERTa, T5, ...), with random
    weights, in the place of a CLIP's text tower.

    It stays in eval mode: dropout would differ between a micro-batch's two passes, and after a
    restart."""
    encoder = AutoModelForTextEncoding.from_config(
        AutoConfig.for_model(**model.config.text_model), dtype=torch.float32,
        attn_implementation="sdpa", trust_remote_code=False)
    encoder.pooler = None  # unused, and DDP waits for the gradient of every parameter
    model.text_encoder = encoder.eval()
    model.encode_text = lambda texts: mean_over_tokens(encoder, texts) @ model.text_projection
    del model.token_embedding, model.positional_embedding, model.transformer, model.ln_final


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


def load(name, config):
    """From a folder or hub name. Sets config.text_model and its width. -> the pre-trained weights,
    {name in CLIP: tensor}. OSError if there are none, or if the encoder takes no such texts."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        encoder, report = AutoModelForTextEncoding.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
        longest = torch.full((1, config.context_length), config.vocab_size - 1)
        with torch.no_grad():
            encoder.eval()(input_ids=longest)
    except (IndexError, RuntimeError):
        raise OSError(f"--text-model {name}: no texts of {config.context_length} tokens "
                      f"(--context-length) with ids up to {config.vocab_size - 1}") from None
    except ValueError as e:  # of transformers, for a model that is no text encoder
        raise OSError(f"--text-model {name}: {str(e).splitlines()[0]}") from None
    if missing := [key for key in report["missing_keys"] if not key.startswith("pooler.")]:
        raise OSError(f"--text-model {name}: its weights lack {missing[0]}, {len(missing)} in all")
    encoder.pooler = None
    config.text_model, config.text_width = encoder.config.to_dict(), encoder.config.hidden_size
    return {f"text_encoder.{key}": value for key, value in encoder.state_dict().items()}
