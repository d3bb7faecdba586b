"""conf/model, conf/quant and conf/lora -> a loaded, quantized base model and its adapter's configuration."""
