# A guest without a kernel that arms its local APIC's timer with a deadline
# (IA32_TSC_DEADLINE) and halts. It tells port 0x90 when it has done so (1) and when
# the interrupt comes (2).
#
# How far ahead the deadline is, in ticks of the TSC, the host puts into memory (8 bytes
# at AHEAD) before the guest runs.
#
# 64-bit mode, identity-mapped, loaded and entered at 0x1000.

	.set	AHEAD, 0x2000
	.set	IDT, 0x3000
	.set	APIC, 0xfee00000
	.set	VECTOR, 0x40
	.set	gate, IDT+VECTOR*16

	.globl	_start
_start:
	movl	$0x8000, %esp
	movl	$due, %eax		# an interrupt gate
	movw	%ax, gate
	movw	%cs, gate+2
	movl	$0x8e00, gate+4
	movq	$0, gate+8
	lidt	idtr
	movl	$APIC, %ebx
	movl	$0x1ff, 0xf0(%rbx)	# enabled
	movl	$(2 << 17 | VECTOR), 0x320(%rbx)	# the timer goes by deadline
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
	movl	$0, 0xb0(%rbx)		# end of interrupt
	jmp	1b			# with what the interrupt has pushed left where it is

idtr:	.word	0xfff
	.quad	IDT
