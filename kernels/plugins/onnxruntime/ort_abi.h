// SPDX-License-Identifier: MIT
// ort_abi.h: what this plug-in uses of ONNX Runtime's C API, declared by itself, so that building needs no header and
// no library of ONNX Runtime. The API is two append-only tables of functions, OrtApi and OrtEpApi: a function keeps its
// index for ever, so an index and a signature are all there is to know. The structs below are filled by a plug-in and
// end where version 1.23 ended; ONNX Runtime reads of them what `ort_version_supported` says.
// tests/native/test_ort_abi.py compares indices, signatures and structs with ONNX Runtime's own header.
#ifndef EDGEMOE_PLUGINS_ONNXRUNTIME_ORT_ABI_H_
#define EDGEMOE_PLUGINS_ONNXRUNTIME_ORT_ABI_H_

#include <cstddef>
#include <cstdint>
#include <cstring>

// The version of the C API in which the last of the functions below appeared: ONNX Runtime 1.23.
constexpr uint32_t kOrtApiVersion = 23;
// For custom operators the last is KernelContext_ParallelFor, of 1.17; but 1.17 cannot tell the type that operators of
// one name and several types have as output ("type inference failed", 1.17.3).
constexpr uint32_t kOrtCustomOpApiVersion = 18;
// Of OrtCustomOp as declared below.
constexpr uint32_t kOrtCustomOpVersion = 17;

extern "C" {

struct OrtStatus;
struct OrtLogger;
struct OrtGraph;
struct OrtNode;
struct OrtValue;
struct OrtValueInfo;
struct OrtTypeInfo;
struct OrtTensorTypeAndShapeInfo;
struct OrtOpAttr;
struct OrtExternalInitializerInfo;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtKeyValuePairs;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtCustomOpDomain;
struct OrtShapeInferContext;
struct OrtHardwareDevice;
struct OrtEpDevice;
struct OrtEpGraphSupportInfo;
struct OrtNodeComputeContext;
struct OrtMemoryInfo;
struct OrtMemoryDevice;
struct OrtAllocator;
struct OrtSyncStreamImpl;
struct OrtDataTransferImpl;

struct OrtApiBase {
  const void* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// Ends where version 1.17 ended.
struct OrtCustomOp {
  uint32_t version;
  void (*CreateKernel)();  // before version 1.16
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  int32_t (*GetInputType)(const OrtCustomOp*, size_t idx);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  int32_t (*GetOutputType)(const OrtCustomOp*, size_t idx);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)();  // before version 1.16
  void (*KernelDestroy)(void* kernel);
  int32_t (*GetInputCharacteristic)(const OrtCustomOp*, size_t idx);
  int32_t (*GetOutputCharacteristic)(const OrtCustomOp*, size_t idx);
  int32_t (*GetInputMemoryType)(const OrtCustomOp*, size_t idx);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const void* api, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);  // optional
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
};

struct OrtNodeFusionOptions {
  uint32_t ort_version_supported;
  bool drop_constant_initializers;
};

struct OrtNodeComputeInfo {
  uint32_t ort_version_supported;
  OrtStatus* (*CreateState)(OrtNodeComputeInfo*, OrtNodeComputeContext*, void** state);
  OrtStatus* (*Compute)(OrtNodeComputeInfo*, void* state, OrtKernelContext*);
  void (*ReleaseState)(OrtNodeComputeInfo*, void* state);
};

struct OrtEp {
  uint32_t ort_version_supported;
  const char* (*GetName)(const OrtEp*);
  OrtStatus* (*GetCapability)(OrtEp*, const OrtGraph*, OrtEpGraphSupportInfo*);
  OrtStatus* (*Compile)(OrtEp*, const OrtGraph** graphs, const OrtNode** fused_nodes, size_t count,
                        OrtNodeComputeInfo** infos, OrtNode** ep_context_nodes);
  void (*ReleaseNodeComputeInfos)(OrtEp*, OrtNodeComputeInfo** infos, size_t n_infos);
  // Optional; the defaults of ONNX Runtime are what we want.
  void (*GetPreferredDataLayout)();
  void (*ShouldConvertDataLayoutForOp)();
  void (*SetDynamicOptions)();
  void (*OnRunStart)();
  void (*OnRunEnd)();
  void (*CreateAllocator)();
  void (*CreateSyncStreamForDevice)();
  void (*GetCompiledModelCompatibilityInfo)();
};

struct OrtEpFactory {
  uint32_t ort_version_supported;
  const char* (*GetName)(const OrtEpFactory*);
  const char* (*GetVendor)(const OrtEpFactory*);
  OrtStatus* (*GetSupportedDevices)(OrtEpFactory*, const OrtHardwareDevice* const* devices, size_t n_devices,
                                    OrtEpDevice** ep_devices, size_t max_ep_devices, size_t* n_ep_devices);
  OrtStatus* (*CreateEp)(OrtEpFactory*, const OrtHardwareDevice* const* devices,
                         const OrtKeyValuePairs* const* metadata, size_t n_devices, const OrtSessionOptions*,
                         const OrtLogger*, OrtEp** ep);
  void (*ReleaseEp)(OrtEpFactory*, OrtEp*);
  uint32_t (*GetVendorId)(const OrtEpFactory*);
  const char* (*GetVersion)(const OrtEpFactory*);
  // All of these are called, unlike OrtEp's.
  OrtStatus* (*ValidateCompiledModelCompatibilityInfo)(OrtEpFactory*, const OrtHardwareDevice* const* devices,
                                                       size_t n_devices, const char* info, int32_t* compatibility);
  OrtStatus* (*CreateAllocator)(OrtEpFactory*, const OrtMemoryInfo*, const OrtKeyValuePairs*, OrtAllocator**);
  void (*ReleaseAllocator)(OrtEpFactory*, OrtAllocator*);
  OrtStatus* (*CreateDataTransfer)(OrtEpFactory*, OrtDataTransferImpl**);
  bool (*IsStreamAware)(const OrtEpFactory*);
  OrtStatus* (*CreateSyncStreamForDevice)(OrtEpFactory*, const OrtMemoryDevice*, const OrtKeyValuePairs*,
                                          OrtSyncStreamImpl**);
};

}  // extern "C"

namespace edgemoe_ort {

template <size_t kIdx, typename Function>
struct Slot;
// The function at index kIdx of a table.
template <size_t kIdx, typename R, typename... Args>
struct Slot<kIdx, R(Args...)> {
  static R Call(const void* table, Args... args) {
    R (*function)(Args...);
    std::memcpy(&function, static_cast<const char*>(table) + kIdx * sizeof(void*), sizeof(function));
    return function(args...);
  }
};

// clang-format off
namespace api {  // OrtApi
using CreateStatus = Slot<0, OrtStatus*(int32_t code, const char* message)>;
using GetErrorMessage = Slot<2, const char*(const OrtStatus*)>;
using CreateCustomOpDomain = Slot<26, OrtStatus*(const char* domain, OrtCustomOpDomain**)>;
using CustomOpDomain_Add = Slot<27, OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)>;
using AddCustomOpDomain = Slot<28, OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)>;
using GetTensorMutableData = Slot<51, OrtStatus*(OrtValue*, void**)>;
using CastTypeInfoToTensorInfo = Slot<55, OrtStatus*(const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**)>;
using GetTensorElementType = Slot<60, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int32_t*)>;
using GetDimensionsCount = Slot<61, OrtStatus*(const OrtTensorTypeAndShapeInfo*, size_t*)>;
using GetDimensions = Slot<62, OrtStatus*(const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)>;
using GetTensorTypeAndShape = Slot<65, OrtStatus*(const OrtValue*, OrtTensorTypeAndShapeInfo**)>;
using KernelContext_GetInput = Slot<90, OrtStatus*(const OrtKernelContext*, size_t, const OrtValue**)>;
using KernelContext_GetOutput = Slot<91, OrtStatus*(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>;
using ReleaseStatus = Slot<93, void(OrtStatus*)>;
using ReleaseTensorTypeAndShapeInfo = Slot<99, void(OrtTensorTypeAndShapeInfo*)>;
using KernelInfo_GetInputName = Slot<232, OrtStatus*(const OrtKernelInfo*, size_t, char*, size_t*)>;
using KernelInfo_GetOutputName = Slot<233, OrtStatus*(const OrtKernelInfo*, size_t, char*, size_t*)>;
using HasSessionConfigEntry = Slot<237, OrtStatus*(const OrtSessionOptions*, const char*, int*)>;
using GetSessionConfigEntry = Slot<238, OrtStatus*(const OrtSessionOptions*, const char*, char*, size_t*)>;
using KernelInfo_GetNodeName = Slot<244, OrtStatus*(const OrtKernelInfo*, char*, size_t*)>;
using KernelInfoGetConstantInput_tensor = Slot<249, OrtStatus*(const OrtKernelInfo*, size_t, int*, const OrtValue**)>;
using ReadOpAttr = Slot<272, OrtStatus*(const OrtOpAttr*, int32_t, void*, size_t, size_t*)>;
using KernelContext_ParallelFor = Slot<274, OrtStatus*(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>;
using GetValueInfoName = Slot<289, OrtStatus*(const OrtValueInfo*, const char**)>;
using GetValueInfoTypeInfo = Slot<290, OrtStatus*(const OrtValueInfo*, const OrtTypeInfo**)>;
using HardwareDevice_Type = Slot<307, int32_t(const OrtHardwareDevice*)>;
using GetEpApi = Slot<317, const void*()>;
using ValueInfo_GetInitializerValue = Slot<326, OrtStatus*(const OrtValueInfo*, const OrtValue**)>;
using ValueInfo_GetExternalInitializerInfo = Slot<327, OrtStatus*(const OrtValueInfo*, OrtExternalInitializerInfo**)>;
using ValueInfo_IsConstantInitializer = Slot<331, OrtStatus*(const OrtValueInfo*, bool*)>;
using Graph_GetModelPath = Slot<334, OrtStatus*(const OrtGraph*, const char**)>;
using Graph_GetNumNodes = Slot<344, OrtStatus*(const OrtGraph*, size_t*)>;
using Graph_GetNodes = Slot<345, OrtStatus*(const OrtGraph*, const OrtNode**, size_t)>;
using Graph_GetParentNode = Slot<346, OrtStatus*(const OrtGraph*, const OrtNode**)>;
using Node_GetName = Slot<349, OrtStatus*(const OrtNode*, const char**)>;
using Node_GetOperatorType = Slot<350, OrtStatus*(const OrtNode*, const char**)>;
using Node_GetDomain = Slot<351, OrtStatus*(const OrtNode*, const char**)>;
using Node_GetNumInputs = Slot<353, OrtStatus*(const OrtNode*, size_t*)>;
using Node_GetInputs = Slot<354, OrtStatus*(const OrtNode*, const OrtValueInfo**, size_t)>;
using Node_GetNumOutputs = Slot<355, OrtStatus*(const OrtNode*, size_t*)>;
using Node_GetOutputs = Slot<356, OrtStatus*(const OrtNode*, const OrtValueInfo**, size_t)>;
using Node_GetNumAttributes = Slot<359, OrtStatus*(const OrtNode*, size_t*)>;
using Node_GetAttributes = Slot<360, OrtStatus*(const OrtNode*, const OrtOpAttr**, size_t)>;
using OpAttr_GetType = Slot<363, OrtStatus*(const OrtOpAttr*, int32_t*)>;
using OpAttr_GetName = Slot<364, OrtStatus*(const OrtOpAttr*, const char**)>;
using ReleaseExternalInitializerInfo = Slot<369, void(OrtExternalInitializerInfo*)>;
using ExternalInitializerInfo_GetFilePath = Slot<370, const char*(const OrtExternalInitializerInfo*)>;
using ExternalInitializerInfo_GetFileOffset = Slot<371, int64_t(const OrtExternalInitializerInfo*)>;
using ExternalInitializerInfo_GetByteSize = Slot<372, size_t(const OrtExternalInitializerInfo*)>;
}  // namespace api

namespace ep_api {  // OrtEpApi
using CreateEpDevice = Slot<0, OrtStatus*(OrtEpFactory*, const OrtHardwareDevice*, const OrtKeyValuePairs*, const OrtKeyValuePairs*, OrtEpDevice**)>;
using EpGraphSupportInfo_AddNodesToFuse = Slot<2, OrtStatus*(OrtEpGraphSupportInfo*, const OrtNode* const*, size_t, const OrtNodeFusionOptions*)>;
}  // namespace ep_api
// clang-format on

constexpr int32_t kOrtFail = 1;  // not ORT_EP_FAIL: at that, Python's session goes on with the stock kernels in silence
constexpr int32_t kOrtCpu = 0;   // OrtHardwareDeviceType
constexpr int32_t kOrtFloat = 1, kOrtUint8 = 2, kOrtFloat16 = 10;          // ONNXTensorElementDataType
constexpr int32_t kOrtAttrInt = 1, kOrtAttrFloat = 3, kOrtAttrString = 5;  // OrtOpAttrType

constexpr int32_t kOrtRequired = 0, kOrtOptional = 1;  // OrtCustomOpInputOutputCharacteristic
constexpr int32_t kOrtMemTypeDefault = 0;              // OrtMemType

}  // namespace edgemoe_ort
#endif  // EDGEMOE_PLUGINS_ONNXRUNTIME_ORT_ABI_H_
