"""What requests and answers mean: the Open Inference Protocol V2, its tensors, and an application's own forms of them."""
