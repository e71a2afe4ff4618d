# A guest without a kernel asks for a ping through port A and sleeps until port B
# interrupts it with the event (docs/ports.md). Its exit code is the event's kind,
# 2 for done, or 100 if the event is not the one it waits for.
#
# 32-bit protected mode, flat, loaded and entered at 0x1000:
#   as --32 -o ports.o ports.s && ld -m elf_i386 -Ttext=0x1000 --oformat=binary -o ports.bin ports.o

	.set	A, 0x6a0		# port A: address, (high half), length, doorbell
	.set	B, 0x6b0		# port B: address, (high half), room, command
	.set	ENABLE, 0x6c0		# interrupt enable
	.set	VECTOR, 0x2a		# GSI 10 is input 2 of the second PIC
	.set	event, 0x3000
	.set	idt, 0x4000

	.macro	out port, value
	movl	\value, %eax
	movl	$\port, %edx
	outl	%eax, %dx
	.endm

	.globl	_start
_start:
# Send the request. This is all there is to it.
	out	A, $request
	out	A+8, $request_end-request
	out	A+12, $1

# Interrupts: a gate for one vector, both PICs, all inputs but GSI 10 masked.
	movl	$handler, %eax
	movw	%ax, idt+VECTOR*8
	movl	$0x8e000010, idt+VECTOR*8+2	# selector 0x10, present 32-bit interrupt gate
	movb	$0, idt+VECTOR*8+4
	movw	$0, idt+VECTOR*8+6		# the handler is below 64 KiB
	lidt	idtr
	movl	$pic, %esi
	movl	$(pic_end-pic)/2, %ecx
1:	movzbl	(%esi), %edx
	movb	1(%esi), %al
	outb	%al, %dx
	addl	$2, %esi
	loop	1b
	out	ENABLE, $1

# Nothing else to do.
	sti
2:	hlt
	jmp	2b

# Take the event into a buffer, and end with its kind: nobody waits for an iret.
handler:
	out	B, $event
	out	B+8, $0x1000
	out	B+12, $1
	inl	%dx, %eax
	testb	$2, %al			# refused?
	movb	$100, %al
	jnz	3f
	cmpl	$0x12345678, event+4	# our request's id
	jne	3f
	movb	event+18, %al		# the event's kind
3:	outb	%al, $0xf4
	jmp	3b

pic:	.byte	0x20, 0x11, 0xa0, 0x11	# edge-triggered, two PICs
	.byte	0x21, 0x20, 0xa1, 0x28	# vectors from 0x20 and 0x28
	.byte	0x21, 0x04, 0xa1, 0x02	# the second one is at input 2
	.byte	0x21, 0x01, 0xa1, 0x01
	.byte	0x21, 0xfb, 0xa1, 0xfb	# masks
pic_end:
idtr:	.word	VECTOR*8+7
	.long	idt

request:
	.ascii	"GD"			# magic
	.byte	1, 2			# version, kind: request
	.long	0x12345678		# id
	.long	7			# bytes of body
	.byte	0, 0			# stream, flags
	.word	0xffff-(0x4447+0x0201+0x5678+0x1234+7) # sum: no carry here
	.byte	0xa1, 0x01, 0x64	# {1: "ping"}
	.ascii	"ping"
request_end:
