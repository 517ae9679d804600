"""Models: nothing but blocks in a row."""

from hamblocks.models.decoder import Decoder, DecoderOutput

__all__ = ["Decoder", "DecoderOutput"]
