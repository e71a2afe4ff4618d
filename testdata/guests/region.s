# A guest without a kernel asks for a ping through the shared region and polls it
# for the event (docs/ports.md). Its exit code is the event's kind, 2 for done, or
# 100 if the region or the event is not what it expects.
#
# 32-bit protected mode, flat, loaded and entered at 0x1000:
#   as --32 --defsym REGION=0x3f0000 -o region.o region.s
#   ld -m elf_i386 -Ttext=0x1000 --oformat=binary -o region.bin region.o

	.globl	_start
_start:
	movl	$REGION, %ebx
	movb	$100, %al
	cmpl	$0x45524447, (%ebx)	# "GDREGION"
	jne	exit
	cmpl	$0x4e4f4947, 4(%ebx)
	jne	exit

# The request fits behind the head: the ring is empty and has not wrapped yet.
	movl	0x10(%ebx), %edi	# offset of the request ring
	addl	%ebx, %edi
	addl	0x40(%ebx), %edi	# head
	movl	$request, %esi
	movl	$request_end-request, %ecx
	rep movsb
	addl	$request_end-request, 0x40(%ebx)
	movl	0x20(%ebx), %edx	# doorbell
	outb	%al, %dx

# Wait for more than a header and the kind.
1:	pause
	movl	0x84(%ebx), %ecx	# event head
	subl	0x44(%ebx), %ecx	# event tail
	cmpl	$19, %ecx
	jb	1b
	movl	0x18(%ebx), %esi	# offset of the event ring
	addl	%ebx, %esi
	addl	0x44(%ebx), %esi
	cmpl	$1, 4(%esi)		# our request's id
	jne	exit
	addl	%ecx, 0x44(%ebx)	# all that is there was read
	outb	%al, %dx
	movb	18(%esi), %al		# the event's kind
exit:	outb	%al, $0xf4
	jmp	exit

request:
	.ascii	"GD"			# magic
	.byte	1, 2			# version, kind: request
	.long	1			# id
	.long	7			# bytes of body
	.byte	0, 0			# stream, flags
	.word	0xb9af			# sum
	.byte	0xa1, 0x01, 0x64	# {1: "ping"}
	.ascii	"ping"
request_end:
