"""Text to tokens and back, and conversations to prompts. No JAX.

`tokenizer`      the protocol, and the tokenizer of models that read plain bytes
`hf_tokenizer`   tokenizer.json of a Hugging Face directory
`open`           choice of a run's tokenizer
`chat_template`  Jinja templates that come with models
`template_reads` what such a template reads of a conversation
`detokenizer`    tokens to text that is never taken back, cut at stop strings
"""
