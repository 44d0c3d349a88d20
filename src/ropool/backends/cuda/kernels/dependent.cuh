// Dependent launch: the next kernel may be scheduled as soon as all blocks of this one have started,
// since it waits itself before it touches memory.

DEVICE void let_next_kernel_start() {
#if PDL && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

DEVICE void wait_for_previous_kernel() {
#if PDL && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
