package nbdexport

import "github.com/pojntfx/go-nbd/pkg/protocol"

// Handshake magics and flags.
const (
	magicInit        = protocol.NEGOTIATION_MAGIC_OLDSTYLE // NBDMAGIC
	magicOption      = protocol.NEGOTIATION_MAGIC_OPTION   // IHAVEOPT
	magicOptionReply = protocol.NEGOTIATION_MAGIC_REPLY

	flagFixedNewstyle = protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE // NBD_FLAG_FIXED_NEWSTYLE
	flagNoZeroes      = uint16(1 << 1)                                     // NBD_FLAG_NO_ZEROES

	clientFixedNewstyle = uint32(1 << 0) // NBD_FLAG_C_FIXED_NEWSTYLE
	clientNoZeroes      = uint32(1 << 1) // NBD_FLAG_C_NO_ZEROES
)

// Options.
const (
	optExportName      = uint32(1)                            // NBD_OPT_EXPORT_NAME
	optAbort           = protocol.NEGOTIATION_ID_OPTION_ABORT // NBD_OPT_ABORT
	optList            = protocol.NEGOTIATION_ID_OPTION_LIST  // NBD_OPT_LIST
	optStartTLS        = uint32(5)                            // NBD_OPT_STARTTLS
	optInfo            = protocol.NEGOTIATION_ID_OPTION_INFO  // NBD_OPT_INFO
	optGo              = protocol.NEGOTIATION_ID_OPTION_GO    // NBD_OPT_GO
	optStructuredReply = uint32(8)                            // NBD_OPT_STRUCTURED_REPLY
	optListMetaContext = uint32(9)                            // NBD_OPT_LIST_META_CONTEXT
	optSetMetaContext  = uint32(10)                           // NBD_OPT_SET_META_CONTEXT
	optExtendedHeaders = uint32(11)                           // NBD_OPT_EXTENDED_HEADERS
)

// Option replies.
const (
	repAck         = protocol.NEGOTIATION_TYPE_REPLY_ACK    // NBD_REP_ACK
	repServer      = protocol.NEGOTIATION_TYPE_REPLY_SERVER // NBD_REP_SERVER
	repInfo        = protocol.NEGOTIATION_TYPE_REPLY_INFO   // NBD_REP_INFO
	repMetaContext = uint32(4)                              // NBD_REP_META_CONTEXT

	repErrUnsup         = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED // NBD_REP_ERR_UNSUP
	repErrPolicy        = uint32(1<<31 + 2)                               // NBD_REP_ERR_POLICY
	repErrInvalid       = uint32(1<<31 + 3)                               // NBD_REP_ERR_INVALID
	repErrTLSReqd       = uint32(1<<31 + 5)                               // NBD_REP_ERR_TLS_REQD
	repErrUnknown       = protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN     // NBD_REP_ERR_UNKNOWN
	repErrShutdown      = uint32(1<<31 + 7)                               // NBD_REP_ERR_SHUTDOWN
	repErrTooBig        = uint32(1<<31 + 9)                               // NBD_REP_ERR_TOO_BIG
	repErrExtHeaderReqd = uint32(1<<31 + 10)                              // NBD_REP_ERR_EXT_HEADER_REQD
)

// Information types.
const (
	infoExport      = protocol.NEGOTIATION_TYPE_INFO_EXPORT      // NBD_INFO_EXPORT
	infoName        = protocol.NEGOTIATION_TYPE_INFO_NAME        // NBD_INFO_NAME
	infoDescription = protocol.NEGOTIATION_TYPE_INFO_DESCRIPTION // NBD_INFO_DESCRIPTION
	infoBlockSize   = protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE   // NBD_INFO_BLOCK_SIZE
)

// Transmission flags.
const (
	flagHasFlags           = protocol.NEGOTIATION_REPLY_FLAGS_HAS_FLAGS      // NBD_FLAG_HAS_FLAGS
	flagReadOnly           = uint16(1 << 1)                                  // NBD_FLAG_READ_ONLY
	flagSendFlush          = uint16(1 << 2)                                  // NBD_FLAG_SEND_FLUSH
	flagSendFUA            = uint16(1 << 3)                                  // NBD_FLAG_SEND_FUA
	flagSendTrim           = uint16(1 << 5)                                  // NBD_FLAG_SEND_TRIM
	flagSendWriteZeroes    = uint16(1 << 6)                                  // NBD_FLAG_SEND_WRITE_ZEROES
	flagSendDF             = uint16(1 << 7)                                  // NBD_FLAG_SEND_DF
	flagCanMultiConn       = protocol.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN // NBD_FLAG_CAN_MULTI_CONN
	flagSendCache          = uint16(1 << 10)                                 // NBD_FLAG_SEND_CACHE
	flagSendFastZero       = uint16(1 << 11)                                 // NBD_FLAG_SEND_FAST_ZERO
	flagBlockStatusPayload = uint16(1 << 12)                                 // NBD_FLAG_BLOCK_STATUS_PAYLOAD
)

// Requests.
const (
	magicRequest         = protocol.TRANSMISSION_MAGIC_REQUEST // NBD_REQUEST_MAGIC
	magicExtendedRequest = uint32(0x21e41c71)                  // NBD_EXTENDED_REQUEST_MAGIC

	requestLen         = 28
	extendedRequestLen = 32
)

// Commands.
const (
	cmdRead        = protocol.TRANSMISSION_TYPE_REQUEST_READ  // NBD_CMD_READ
	cmdWrite       = protocol.TRANSMISSION_TYPE_REQUEST_WRITE // NBD_CMD_WRITE
	cmdDisc        = protocol.TRANSMISSION_TYPE_REQUEST_DISC  // NBD_CMD_DISC
	cmdFlush       = uint16(3)                                // NBD_CMD_FLUSH
	cmdTrim        = uint16(4)                                // NBD_CMD_TRIM
	cmdCache       = uint16(5)                                // NBD_CMD_CACHE
	cmdWriteZeroes = uint16(6)                                // NBD_CMD_WRITE_ZEROES
	cmdBlockStatus = uint16(7)                                // NBD_CMD_BLOCK_STATUS
)

// Command flags.
const (
	cmdFlagFUA        = uint16(1 << 0) // NBD_CMD_FLAG_FUA
	cmdFlagNoHole     = uint16(1 << 1) // NBD_CMD_FLAG_NO_HOLE
	cmdFlagDF         = uint16(1 << 2) // NBD_CMD_FLAG_DF
	cmdFlagReqOne     = uint16(1 << 3) // NBD_CMD_FLAG_REQ_ONE
	cmdFlagFastZero   = uint16(1 << 4) // NBD_CMD_FLAG_FAST_ZERO
	cmdFlagPayloadLen = uint16(1 << 5) // NBD_CMD_FLAG_PAYLOAD_LEN
)

// Replies.
const (
	magicSimpleReply     = protocol.TRANSMISSION_MAGIC_REPLY // NBD_SIMPLE_REPLY_MAGIC
	magicStructuredReply = uint32(0x668e33ef)                // NBD_STRUCTURED_REPLY_MAGIC
	magicExtendedReply   = uint32(0x6e8a278c)                // NBD_EXTENDED_REPLY_MAGIC

	simpleReplyLen     = 16
	structuredReplyLen = 20
	extendedReplyLen   = 32

	replyFlagDone = uint16(1 << 0) // NBD_REPLY_FLAG_DONE

	replyNone           = uint16(0)         // NBD_REPLY_TYPE_NONE
	replyOffsetData     = uint16(1)         // NBD_REPLY_TYPE_OFFSET_DATA
	replyOffsetHole     = uint16(2)         // NBD_REPLY_TYPE_OFFSET_HOLE
	replyBlockStatus    = uint16(5)         // NBD_REPLY_TYPE_BLOCK_STATUS
	replyBlockStatusExt = uint16(6)         // NBD_REPLY_TYPE_BLOCK_STATUS_EXT
	replyError          = uint16(1<<15 + 1) // NBD_REPLY_TYPE_ERROR
)

// Flags of the context base:allocation.
const (
	stateHole = uint32(1 << 0) // NBD_STATE_HOLE
	stateZero = uint32(1 << 1) // NBD_STATE_ZERO
)

// contextAllocation is the metadata context that the protocol itself defines.
const contextAllocation = "base:allocation"

// replyMode is what was negotiated about headers and replies. Each mode
// includes the ones before it.
type replyMode uint8

const (
	modeSimple     replyMode = iota // nothing negotiated
	modeStructured                  // NBD_OPT_STRUCTURED_REPLY
	modeExtended                    // NBD_OPT_EXTENDED_HEADERS
)
