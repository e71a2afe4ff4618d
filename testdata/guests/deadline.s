# A guest without a kernel that arms its local APIC's timer with a deadline
# (IA32_TSC_DEADLINE) and halts. It tells port 0x90 when it has done so (1) and when
# the interrupt comes (2).
#
# How far ahead the deadline is, in ticks of the TSC, the host puts into memory (8 bytes
# at AHEAD) before the guest runs.
#
# 32-bit protected mode, flat, loaded and entered at 0x1000.

	.set	AHEAD, 0x2000
	.set	IDT, 0x3000
	.set	APIC, 0xfee00000
	.set	VECTOR, 0x40

	.globl	_start
_start:
	movl	$0x8000, %esp
	movl	$due, %eax		# an interrupt gate
	movw	%ax, IDT+VECTOR*8
	movw	%cs, IDT+VECTOR*8+2
	movw	$0x8e00, IDT+VECTOR*8+4
	shrl	$16, %eax
	movw	%ax, IDT+VECTOR*8+6
	lidt	idtr
	movl	$0x1ff, APIC+0xf0	# enabled
	movl	$(2 << 17 | VECTOR), APIC+0x320	# the timer goes by deadline
	rdtsc
	addl	AHEAD, %eax
	adcl	AHEAD+4, %edx
	movl	$0x6e0, %ecx
	wrmsr
	movb	$1, %al
	outb	%al, $0x90
1:	sti
	hlt
	jmp	1b

due:	movb	$2, %al
	outb	%al, $0x90
	movl	$0, APIC+0xb0		# end of interrupt
	iretl

idtr:	.word	0x7ff
	.long	IDT
