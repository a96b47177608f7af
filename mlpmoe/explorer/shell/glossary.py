"""The words that the page uses, in a sentence each."""

WORDS = """
* **Perplexity**: among how many tokens the model hesitates, on average. Lower is better.
* **Bits per byte**: how many bits the model needs to guess one byte of the text. Lower is better.
* **MLP**: the part of each layer that treats every token by itself. It has two or three matrices: \
**gate** and **up** compute the neurons, **down** adds up what they say.
* **d_model, d_ff**: numbers a token is made of between layers; neurons of one MLP.
* **Branch**: a group of neurons. Each branch has a factor **α**, 1 at first.
* **Expert, router**: a group of neurons that runs only for tokens that the router picks it for. \
**Shared** neurons run for all.
* **MLP compute**: multiply-adds in the weight matrices of the MLPs, of the dense model's.
* **Compensation**: what makes up for the dropped branches; as published the factor √(B/K) on \
those that are kept.
* **Calibration text**: text that a recipe may look at before it cuts. It is never the text that \
perplexity is measured on.
* **Checkpoint**: a folder with a model's weights and settings, which other software opens.
* **Down refitted**: down is computed anew, by least squares, so that the neurons that stay say \
as nearly as possible what all said.
* **Training, distillation**: the converted model learns to predict what the dense model does. \
**KL divergence** says how far the two predictions are apart, 0 for none; **held out** is text \
that is never trained on.
* **Wanda, SparseGPT, FLAP**: published ways to choose what to remove by looking at activations.
* **Squared weights**: the share of the sum of w², in which large weights count more.
* **Run**: settings with what was measured for them. **Front**: the runs that no other beats.
* **Loss**: how surprised the model is by a token, in nats; its mean is the logarithm of the \
perplexity.
* **Drift**: how far the numbers that stand for a token have moved from those of the dense model.
* **WikiText-2, C4**: the public texts that published perplexities are measured on.
* **Proxy mixture**: a short artificial text, as in the paper; it shows whether a model \
broke, not which one is better."""
