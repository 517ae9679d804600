"""What a pretrained model loses under each cache policy: `hamblocks evaluate`."""
