/* Entry: hart 0 gets a stack, zeroed variables and the device tree; others sleep for ever. */
    .section .text.start, "ax"
    .globl _start
_start:
    csrr t0, mhartid
    bnez t0, park
    .option push
    .option norelax
    la gp, __global_pointer$
    .option pop
    la sp, ps_stack_top
    la t0, ps_trap
    csrw mtvec, t0
    la t0, ps_bss
    la t1, ps_bss_end
clear:
    bgeu t0, t1, enter
    sd zero, 0(t0)
    addi t0, t0, 8
    j clear
enter:
    mv a0, a1
    call ps_board_main
park:
    wfi
    j park
