# Whisper tiny.en with real weights, which come with a Python package (docs/vit.md): 150 tokens merged
# in each of the encoder's four blocks, 1500 become 900, copied back for the decoder.
custom_imports = dict(imports=["mmagic_tome"], allow_failed_imports=False)

model = dict(type="ToMe", model=dict(type="WhisperTinyEn"), r=150)

# 30 seconds, a token every 20 ms.
vit_input = dict(kind="audio")
