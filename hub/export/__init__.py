"""Export trained models: native folders for AutoModel, ONNX, timm's names, the decoder alone."""
